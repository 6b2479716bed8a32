"""Entry point for `ray job submit`: `madpo-ray margins` with the same flags."""

from madpo_ray.cli import job

main = job("margins")

if __name__ == "__main__":
    main()
