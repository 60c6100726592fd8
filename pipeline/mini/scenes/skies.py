"""Panoramas that close: a sky, the sun at a given height, weather, and a place in a season, as their words say.

A picture is an equirectangular map, 2:1: columns are azimuths from -180 to 180 degrees, rows elevations from 90 down to
-90. Everything is a function of the direction, so the last column meets the first.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from .noise import noise

Weather = Literal["clear", "partly cloudy", "overcast", "foggy", "rainy", "snowy"]
Season = Literal["spring", "summer", "autumn", "winter"]
Place = Literal["sea", "mountains", "city", "park"]
WEATHERS: tuple[Weather, ...] = ("clear", "partly cloudy", "overcast", "foggy", "rainy", "snowy")
SEASONS: tuple[Season, ...] = ("spring", "summer", "autumn", "winter")
PLACES: tuple[Place, ...] = ("sea", "mountains", "city", "park")
SUN_SEEN: tuple[Weather, ...] = ("clear", "partly cloudy")  # in all others it is behind the clouds

_SUN_RADIUS = 3.0  # degrees; six times the real one, or it would be less than a pixel
_COVER = {"clear": 0.0, "partly cloudy": 0.4, "overcast": 1.0, "foggy": 1.0, "rainy": 1.0, "snowy": 1.0}
_LEAVES = {
    "spring": (0.55, 0.72, 0.35),
    "summer": (0.20, 0.47, 0.18),
    "autumn": (0.80, 0.45, 0.14),
    "winter": (0.55, 0.52, 0.50),
}
_GRASS = {
    "spring": (0.45, 0.66, 0.28),
    "summer": (0.30, 0.55, 0.20),
    "autumn": (0.58, 0.52, 0.25),
    "winter": (0.84, 0.87, 0.91),
}


@dataclass(frozen=True)
class Sky:
    """sun_height: degrees above the horizon, 0..88; sun_azimuth: degrees, 0 in the middle of the picture."""

    sun_height: float
    sun_azimuth: float
    weather: Weather
    season: Season
    place: Place


def render_sky(sky: Sky, height: int, generator: np.random.Generator) -> np.ndarray:
    """(height, 2 * height, 3) float32 in 0..1, sampled twice as finely. generator: for clouds, ridges and houses."""
    fine = 2 * height
    elevation = (90 - (np.arange(fine) + 0.5) * 180 / fine)[:, None]
    azimuth = ((np.arange(2 * fine) + 0.5) * 180 / fine - 180)[None, :]
    directions = _directions(elevation, azimuth)
    above = np.abs(directions)  # what water mirrors; y is up
    air = _air(sky, directions, above[..., 1])
    air = _with_clouds(sky, air, np.stack([directions[..., 0], above[..., 1], directions[..., 2]], -1), generator)
    ground = {"sea": _sea, "mountains": _mountains, "city": _city, "park": _park}[sky.place]
    drawn = ground(sky, air, elevation, azimuth, generator)
    drawn = _with_weather(sky, drawn, elevation, generator)
    return drawn.reshape(height, 2, 2 * height, 2, 3).mean((1, 3)).clip(0, 1).astype(np.float32)


def _directions(elevation: np.ndarray, azimuth: np.ndarray) -> np.ndarray:
    up, around = np.radians(elevation), np.radians(azimuth)
    parts = np.cos(up) * np.sin(around), np.sin(up), np.cos(up) * np.cos(around)
    return np.stack(np.broadcast_arrays(*parts), -1)


def _daylight(sky: Sky) -> float:
    """0 with the sun on the horizon, 1 with the sun high."""
    return float(np.clip(np.sin(np.radians(sky.sun_height)) * 1.8, 0, 1))


def _mixed(first: object, second: object, share: np.ndarray | float) -> np.ndarray:
    share = np.asarray(share, np.float64)
    share = share[..., None] if share.ndim >= 2 else share
    return np.asarray(first) * (1 - share) + np.asarray(second) * share


def _air(sky: Sky, directions: np.ndarray, up: np.ndarray) -> np.ndarray:
    """Blue above, pale or red at the horizon, and the glow and disc of the sun."""
    day, cover = _daylight(sky), _COVER[sky.weather]
    zenith = _mixed((0.13, 0.16, 0.38), (0.16, 0.40, 0.80), day)
    horizon = _mixed((0.98, 0.58, 0.34), (0.72, 0.86, 0.96), day)
    colour = _mixed(horizon, zenith, np.clip(up, 0, 1) ** (0.35 + 0.25 * day))
    sun = _directions(np.array([[sky.sun_height]]), np.array([[sky.sun_azimuth]]))[0, 0]
    mirrored = np.concatenate([directions[..., :1], up[..., None], directions[..., 2:]], -1)
    apart = np.degrees(np.arccos(np.clip(mirrored @ sun, -1, 1)))
    warm = _mixed((1.0, 0.55, 0.25), (1.0, 0.97, 0.88), day)
    colour = _mixed(colour, warm, 0.75 * np.exp(-apart / (9 + 8 * (1 - day))))
    colour = _mixed(colour, (1.0, 1.0, 0.94), np.clip(_SUN_RADIUS + 0.7 - apart, 0, 1))
    grey = _mixed((0.42, 0.42, 0.48), (0.78, 0.80, 0.83), day)
    return _mixed(colour, grey, cover**3 if sky.weather not in SUN_SEEN else 0.0)


def _with_clouds(sky: Sky, air: np.ndarray, directions: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    cover = _COVER[sky.weather]
    if not cover:
        return air
    # A flat layer seen from below: clouds shrink towards the horizon.
    over = directions[..., [0, 2]] / (directions[..., 1:2] + 0.18)
    shape = noise(over * 1.3, generator, octaves=5)
    low, high = np.quantile(shape[: len(shape) // 2], [1 - cover, 1.25 - cover]) if cover < 1 else (-1, 0)
    thick = np.clip((shape - low) / max(high - low, 1e-3), 0, 1) * np.clip(directions[..., 1] * 8, 0, 1)
    lit = _mixed((0.86, 0.66, 0.58), (0.86, 0.88, 0.90), _daylight(sky))  # never as bright as the sun
    dark = {"rainy": 0.35, "overcast": 0.60, "snowy": 0.75}.get(sky.weather, 0.80)
    shade = noise(over * 2.1 + 7, generator, octaves=3)[..., None]
    white = lit * (dark + (1 - dark) * shade)
    seen = thick * (0.9 if sky.weather in SUN_SEEN else 1.0)
    if sky.weather in SUN_SEEN:
        sun = _directions(np.array([[sky.sun_height]]), np.array([[sky.sun_azimuth]]))[0, 0]
        seen = seen * np.clip((np.degrees(np.arccos(np.clip(directions @ sun, -1, 1))) - 5) / 9, 0, 1)  # none before it
    return _mixed(air, white, seen)


def _haze(sky: Sky) -> np.ndarray:
    return _mixed((0.80, 0.60, 0.52), (0.76, 0.83, 0.90), _daylight(sky))


def _lit(sky: Sky, colour: object) -> np.ndarray:
    return np.asarray(colour) * (0.45 + 0.55 * _daylight(sky)) * (0.8 if _COVER[sky.weather] > 0.8 else 1.0)


def _ridge(azimuth: np.ndarray, generator: np.random.Generator, roughness: float, waves: int = 24) -> np.ndarray:
    """A line around the horizon, 0..1, the same at both ends: whole waves only."""
    number = np.arange(2, waves)
    size = generator.normal(size=len(number)) / number**roughness
    phase = generator.uniform(0, 2 * np.pi, len(number))
    line = (size[:, None] * np.cos(number[:, None] * np.radians(azimuth) + phase[:, None])).sum(0)
    return (line - line.min()) / (np.ptp(line) + 1e-9)


def _way_for_sun(sky: Sky, azimuth: np.ndarray) -> np.ndarray:
    """A factor on heights: a valley or a street towards a sun that would stand behind them."""
    away = np.abs((azimuth - sky.sun_azimuth + 180) % 360 - 180)
    return np.clip((away - 6) / 14, 0.1, 1) if sky.weather in SUN_SEEN and sky.sun_height < 32 else np.ones_like(away)


def _ground(sky: Sky, elevation: np.ndarray, azimuth: np.ndarray, near: object, generator: np.random.Generator):
    """A field below the horizon: hazy far away, speckled close by."""
    depth = np.clip(-elevation / 50, 0, 1)
    points = _directions(elevation, azimuth)
    spots = noise(points[..., [0, 2]] / (np.abs(points[..., 1:2]) + 0.08) * 2, generator, octaves=4)[..., None]
    return _mixed(_haze(sky), _lit(sky, near), (depth**0.4) * np.ones_like(azimuth)) * (0.82 + 0.3 * spots)


def _sea(
    sky: Sky, air: np.ndarray, elevation: np.ndarray, azimuth: np.ndarray, generator: np.random.Generator
) -> np.ndarray:
    below = elevation < 0
    points = _directions(elevation, azimuth)
    waves = noise(points[..., [0, 2]] / (np.abs(points[..., 1:2]) + 0.05) * 3, generator, octaves=4)
    water = _mixed(air, _lit(sky, (0.05, 0.28, 0.42)), np.clip(-elevation / 45, 0.15, 0.9) * np.ones_like(azimuth))
    water = water * (0.85 + 0.3 * waves[..., None])
    if sky.weather in SUN_SEEN:
        away = (azimuth - sky.sun_azimuth + 180) % 360 - 180
        path = np.exp(-((away / (5 - elevation * 0.12).clip(3, 20)) ** 2)) * np.clip(1 + elevation / 60, 0, 1)
        water = _mixed(water, (1.0, 0.93, 0.78), 0.45 * path * np.clip(waves * 1.7 - 0.45, 0, 1))
    if sky.season == "winter" and sky.weather in SUN_SEEN:
        floes = noise(points[..., [0, 2]] / (np.abs(points[..., 1:2]) + 0.05) * 1.5 + 31, generator, octaves=3)
        water = _mixed(water, _lit(sky, (0.93, 0.96, 1.0)), np.clip(floes * 8 - 4.4, 0, 0.9) * below)
    return np.where(below[..., None], water, air)


def _mountains(
    sky: Sky, air: np.ndarray, elevation: np.ndarray, azimuth: np.ndarray, generator: np.random.Generator
) -> np.ndarray:
    drawn = np.where((elevation < 0)[..., None], _ground(sky, elevation, azimuth, _GRASS[sky.season], generator), air)
    for far, top, rock in ((0.6, 24, (0.38, 0.42, 0.52)), (0.25, 13, (0.30, 0.34, 0.33))):
        line = _way_for_sun(sky, azimuth) * (3 + top * _ridge(azimuth, generator, 1.1 + 0.3 * far))
        inside = (elevation < line) & (elevation > -1)
        around = np.radians(azimuth)
        places = np.cos(around) * 9 + elevation * 0.5, np.sin(around) * 9 - elevation * 0.3
        rough = noise(np.stack(np.broadcast_arrays(*places), -1), generator)
        colour = _lit(sky, rock) * (0.75 + 0.5 * rough[..., None])
        snow = {"winter": 0.15, "spring": 0.62, "autumn": 0.75, "summer": 0.86}[sky.season] + 0.25 * (rough - 0.5)
        capped = np.clip((elevation / (3 + top) - snow) * 14, 0, 1)
        colour = _mixed(colour, _lit(sky, (0.82, 0.85, 0.90)), capped * np.ones_like(rough))
        drawn = np.where(inside[..., None], _mixed(colour, _haze(sky), far * 0.7), drawn)
    return drawn


def _city(
    sky: Sky, air: np.ndarray, elevation: np.ndarray, azimuth: np.ndarray, generator: np.random.Generator
) -> np.ndarray:
    paved = (0.90, 0.92, 0.95) if sky.season == "winter" else (0.40, 0.40, 0.42)
    drawn = np.where((elevation < 0)[..., None], _ground(sky, elevation, azimuth, paved, generator), air)
    for far, houses, tall in ((0.55, 40, 16), (0.15, 26, 24)):
        edges = np.sort(generator.uniform(-180, 180, houses))
        house = np.searchsorted(edges, azimuth[0]) % houses  # the last one goes on where the first begins
        tops = 4 + tall * generator.beta(1.3, 2.6, houses)
        inside = (elevation < tops[house][None] * _way_for_sun(sky, azimuth)) & (elevation > -3)
        walls = generator.uniform(0.28, 0.62, (houses, 1)) * np.array([[1.0, 0.98, 0.95]])
        colour = np.broadcast_to(_lit(sky, walls[house])[None], drawn.shape)
        window = ((elevation % 2.0) < 1.0) & ((azimuth % 3.0) < 1.4)
        places = np.floor(azimuth / 3) * 5.1, np.floor(elevation / 2) * 3.7
        on = noise(np.stack(np.broadcast_arrays(*places), -1), generator)
        glow = (1.0, 0.82, 0.45) if _daylight(sky) < 0.45 else (0.55, 0.66, 0.76)
        colour = _mixed(colour, glow, window * (on > 0.45) * 0.75)
        drawn = np.where(inside[..., None], _mixed(colour, _haze(sky), far), drawn)
    return drawn


def _park(
    sky: Sky, air: np.ndarray, elevation: np.ndarray, azimuth: np.ndarray, generator: np.random.Generator
) -> np.ndarray:
    drawn = np.where((elevation < 0)[..., None], _ground(sky, elevation, azimuth, _GRASS[sky.season], generator), air)
    for _ in range(26):
        size = generator.uniform(5, 14)
        middle, foot = generator.uniform(-180, 180), -0.35 * size
        away = (azimuth[0] - middle + 180) % 360 - 180
        if sky.weather in SUN_SEEN and abs((sky.sun_azimuth - middle + 180) % 360 - 180) < size and sky.sun_height < 25:
            continue
        columns = np.flatnonzero(np.abs(away) < size)
        rows = np.flatnonzero((elevation[:, 0] > foot) & (elevation[:, 0] < 2.2 * size))
        place = np.ix_(rows, columns)
        drawn[place] = _tree(sky, drawn[place], away[None, columns], elevation[rows], size, generator)
    return drawn


def _tree(
    sky: Sky, behind: np.ndarray, away: np.ndarray, elevation: np.ndarray, size: float, generator: np.random.Generator
) -> np.ndarray:
    """A tree before ``behind``. away: degrees from its trunk; size: degrees from the horizon to the crown's middle."""
    trunk = (np.abs(away) < size * 0.08) & (elevation < size * 0.8)
    drawn = np.where(trunk[..., None], _lit(sky, (0.32, 0.23, 0.16)), behind)
    edge = noise(np.stack(np.broadcast_arrays(away * 0.55, elevation * 0.55), -1) + 90, generator, octaves=3)
    crown = (away / (size * 0.55)) ** 2 + ((elevation - size) / (size * 0.65)) ** 2 < 0.55 + 0.8 * edge
    bare = edge > 0.52 if sky.season == "winter" else True
    blossom = sky.season == "spring" and generator.random() < 0.4
    leaf = np.array((0.95, 0.70, 0.78) if blossom else _LEAVES[sky.season])
    lit = _lit(sky, leaf) * (0.7 + 0.25 * (elevation - size * 0.6) / size + 0.35 * edge)[..., None]
    return np.where((crown & bare)[..., None], lit, drawn)


def _with_weather(sky: Sky, drawn: np.ndarray, elevation: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    rows, columns = drawn.shape[:2]
    if sky.weather == "foggy":
        return _mixed(drawn, _haze(sky), np.clip(0.92 - np.abs(elevation) / 90, 0.25, 0.9) * np.ones((1, columns)))
    if sky.weather in ("rainy", "snowy"):
        drawn = _mixed(drawn, _haze(sky) * 0.9, 0.25)
        count, length = (columns, rows // 16) if sky.weather == "rainy" else (columns, 1)
        for row, column in zip(generator.integers(0, rows, count), generator.integers(0, columns, count), strict=True):
            if sky.weather == "rainy":
                drawn[row : row + length, column] = drawn[row : row + length, column] * 0.6 + 0.3
            else:
                drawn[row : row + 2, [column, (column + 1) % columns]] = 0.97
    return drawn


# --- what a picture shows of it ---


def sun_height_in(picture: np.ndarray) -> float:
    """Degrees above the horizon of the sun in (H, 2H, 3) in 0..1: what stands out most from the sky around it."""
    height = len(picture)
    light = picture[: height // 2, :, :2].min(-1)  # yellow at least, which neither blue nor a red glow is
    reach = max(1, round(_SUN_RADIUS * height / 180))
    standing = _box_mean(light, reach) - 0.5 * _box_mean(light, 5 * reach)
    rows, _ = np.nonzero(standing >= standing.max() - 1e-3)
    return float(90 - (rows.mean() + 0.5) * 180 / height)


def _box_mean(light: np.ndarray, reach: int) -> np.ndarray:
    """Over squares of 2 * reach + 1; the columns go on around."""
    padded = np.pad(np.pad(light, ((reach, reach), (0, 0)), mode="edge"), ((0, 0), (reach, reach)), mode="wrap")
    return np.lib.stride_tricks.sliding_window_view(padded, (2 * reach + 1, 2 * reach + 1)).mean((-2, -1))


def seam_error(picture: np.ndarray) -> float:
    """How much more the last column differs from the first than neighbours do elsewhere; 1 is no seam at all."""
    steps = np.abs(np.diff(picture, axis=1)).mean((0, 2))
    seam = np.abs(picture[:, -1] - picture[:, 0]).mean()
    return float(seam / max(steps.mean(), 1e-6))
