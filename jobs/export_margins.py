"""Entry point for `ray job submit`: `madpo-ray export` with the same flags."""

from madpo_ray.cli import script_main

main = script_main("export")

if __name__ == "__main__":
    main()
