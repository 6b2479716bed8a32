"""Entry point for `ray job submit`: `madpo-ray reward` with the same flags."""

from madpo_ray.cli import script_main

main = script_main("reward")

if __name__ == "__main__":
    main()
