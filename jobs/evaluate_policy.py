"""Entry point for `ray job submit`: `madpo-ray evaluate` with the same flags."""

from madpo_ray.cli import job

main = job("evaluate")

if __name__ == "__main__":
    main()
