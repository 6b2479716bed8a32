"""Entry point for `ray job submit`: `madpo-ray margins` with the same flags."""

from madpo_ray.cli import script_main

main = script_main("margins")

if __name__ == "__main__":
    main()
