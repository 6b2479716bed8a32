"""Entry point for `ray job submit`: `madpo-ray sft` with the same flags."""

from madpo_ray.cli import job

main = job("sft")

if __name__ == "__main__":
    main()
