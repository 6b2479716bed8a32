"""The search space: what is drawn, and the settings that follow."""

import itertools
import math
import random
from collections.abc import Mapping
from typing import Any

from madpo_ray.config import SEED, Config, Domain
from madpo_ray.config.search import Choice, Grid, Integers, LogUniform, Reciprocal, Uniform

Values = dict[str, Any]  # by dotted key

MAX_CORNERS = 1000


def drawn_domains(space: Mapping[str, Domain]) -> dict[str, Domain]:
    """The domains that are drawn; the others follow from them."""
    return {key: domain for key, domain in space.items() if not isinstance(domain, Reciprocal)}


def count_trials(config: Config) -> int:
    """The trials of a complete search."""
    grids = [one for one in config.search_space.values() if isinstance(one, Grid)]
    return config.tune.num_samples * math.prod(len(grid.values) for grid in grids)


def trials_at_a_time(config: Config) -> int | None:
    """How many trials run at the same time; None: as many as fit."""
    # Actors that sample and judge are not counted, and trials would wait for each other's; where
    # nodes come on demand, what fits is not known.
    follows = config.tune.objective == "accuracy" and not config.cluster.autoscaling
    return config.tune.max_concurrent_trials or (None if follows else 1)


def own_point(config: Config) -> Values | None:
    """The config's own values of what is drawn; None if the search space does not hold them all."""
    space = config.search_space
    drawn = drawn_domains(space)
    values = {key: _value_of(config, key) for key in drawn}
    if not all(_holds(drawn[key], value) for key, value in values.items()):
        return None
    follow = {
        key: value for key, value in with_reciprocals(space, values).items() if key not in drawn
    }
    is_own = all(math.isclose(value, _value_of(config, key)) for key, value in follow.items())
    return values if is_own else None


def _value_of(config: Config, key: str) -> Any:
    section, name = key.split(".")
    value = getattr(getattr(config, section), name)
    # A list of one, such as lora_target_modules, may be given as its only member.
    return value[0] if isinstance(value, tuple) and len(value) == 1 else value


def _holds(domain: Domain, value: Any) -> bool:
    if isinstance(domain, Choice | Grid):
        return value in domain.values
    if isinstance(domain, Reciprocal) or isinstance(value, bool | None | str):
        return False
    is_kind = not isinstance(domain, Integers) or value == int(value)
    return bool(is_kind and domain.min <= value <= domain.max)


def random_points(config: Config) -> list[Values]:
    """All points of a search without a searcher: drawn values, with every point of the grids.

    The first draw is the config's own values, as far as the space holds them.
    """
    drawn = drawn_domains(config.search_space)
    grids = {key: one.values for key, one in drawn.items() if isinstance(one, Grid)}
    others = {key: one for key, one in drawn.items() if key not in grids}
    rng = random.Random(config.run.seed)
    points = []
    for number in range(config.tune.num_samples):
        values = {key: _draw(one, rng) for key, one in others.items()}
        if number == 0:
            own = {key: _value_of(config, key) for key in others}
            values |= {key: own[key] for key in others if _holds(others[key], own[key])}
        for combination in itertools.product(*grids.values()):
            point = values | dict(zip(grids, combination, strict=True))
            points.append({key: point[key] for key in drawn})  # in the order of the space
    return points


def _draw(domain: Domain, rng: random.Random) -> Any:
    match domain:
        case Uniform(min=low, max=high):
            return rng.uniform(low, high)
        case LogUniform(min=low, max=high):
            return math.exp(rng.uniform(math.log(low), math.log(high)))
        case Integers(min=low, max=high, log=False):
            return rng.randint(low, high)
        case Integers(min=low, max=high):
            drawn = math.exp(rng.uniform(math.log(low - 0.5), math.log(high + 0.5)))
            return min(max(round(drawn), low), high)
        case Choice(values=values):
            return rng.choice(values)
    raise TypeError(f"{domain} is not drawn")


def with_reciprocals(space: Mapping[str, Domain], drawn: Mapping[str, Any]) -> Values:
    """The values of all keys of the space, in its order."""
    found = {}
    for key, domain in space.items():
        if isinstance(domain, Reciprocal):
            found[key] = 1 / drawn[domain.of]
        else:
            found[key] = drawn[key]
    return found


def settings_of(values: Mapping[str, Any]) -> tuple[Values, int | None]:
    """Values by their names in section train, and the seed if it was varied."""
    settings = {key.removeprefix("train."): value for key, value in values.items() if key != SEED}
    return settings, values.get(SEED)


def corners(space: Mapping[str, Domain]) -> list[Values]:
    """Values at both ends of every range and of every choice, in all combinations.

    In some of them, if there are too many: then each end is in at least one.
    """
    ends = {key: _ends(domain) for key, domain in drawn_domains(space).items()}
    if math.prod(map(len, ends.values())) <= MAX_CORNERS:
        points = [
            dict(zip(ends, point, strict=True)) for point in itertools.product(*ends.values())
        ]
    else:
        longest = max(map(len, ends.values()))
        points = [
            {key: values[min(i, len(values) - 1)] for key, values in ends.items()}
            for i in range(longest)
        ]
    return [with_reciprocals(space, point) for point in points]


def _ends(domain: Domain) -> tuple[Any, ...]:
    if isinstance(domain, Choice | Grid):
        return domain.values
    return (domain.min, domain.max)  # type: ignore[union-attr]
