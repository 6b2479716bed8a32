"""Entry point for `ray job submit`: `madpo-ray run` with the same flags."""

from madpo_ray.cli import job

main = job("run")

if __name__ == "__main__":
    main()
