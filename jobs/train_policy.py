"""Entry point for `ray job submit`: `madpo-ray train` with the same flags."""

from madpo_ray.cli import script_main

main = script_main("train")

if __name__ == "__main__":
    main()
