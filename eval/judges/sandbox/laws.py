"""The laws of each scene, checked on measured tracks: every error is in world units and free of NaN.

Motion is checked step by step: from each three frames, the acceleration that was seen is compared with the one that the
world demands there. Steps in which a contact must have happened (the free motion would have gone through the floor or
the other ball, seen forwards or backwards in time) are left to the contact's own law, which compares conserved
quantities before and after it and so needs no sub-frame timing.

A scene's function returns errors (N,) in world units by their names in `eval.judges.sandbox.judge.LAWS`, without those
that the scene does not have, and "event" (N,) in [0, 1]: the setting is there and the scene's event is seen.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from eval.judges.sandbox.structure import (
    background_error,
    find_panel,
    fit_line,
    fit_ramp,
    ground_setting,
    panel_setting,
    plain_setting,
    visible_fraction,
)
from eval.judges.sandbox.vision import Seen
from eval.sandbox.world import COLLISION_RESTITUTION, FLOOR, FRICTION, GRAVITY, PIVOT_HEIGHT, RESTITUTION

NO_MEASUREMENT = 10.0  # error where a law finds too few frames to be checked: far outside every tolerance
FEWEST_STEPS = 4  # steps of three frames below which an acceleration is not believed
TOUCH = 0.015  # u, how near a predicted contact must come to be taken for one
SLOWEST_IMPACT = 0.3  # u/s, impacts below it have no measurable restitution
SLOWEST_APPROACH = 0.1  # u/s, the same for two balls
CORNER = 0.13  # u, reach of the ramp's fillet on either side of its foot, where only the work is checked


def steps(track: Tensor, found: Tensor, interval: float) -> tuple[Tensor, Tensor]:
    """Second differences / interval^2 (N, T-2, ...) of a track (N, T, ...) and where all three frames are found."""
    acceleration = (track[:, 2:] - 2 * track[:, 1:-1] + track[:, :-2]) / interval**2
    return acceleration, found[:, 2:] & found[:, 1:-1] & found[:, :-2]


def root_mean_square(values: Tensor, valid: Tensor, fewest: int = FEWEST_STEPS) -> Tensor:
    """(N,) over the valid ones of (N, S); NO_MEASUREMENT where fewer than `fewest` are valid."""
    number = valid.sum(dim=1)
    mean = (values**2 * valid).sum(dim=1) / number.clamp(min=1)
    return torch.where(number >= fewest, mean.sqrt(), torch.full_like(mean, NO_MEASUREMENT))


def largest(values: Tensor, valid: Tensor) -> Tensor:
    return (values.abs() * valid).amax(dim=1)


def strength_error(seen: Tensor, demanded: Tensor, valid: Tensor) -> Tensor:
    """(N,) |least-squares factor between seen and demanded accelerations (N, S) - 1|; 0 where nothing is demanded."""
    product, power = (seen * demanded * valid).sum(dim=1), (demanded**2 * valid).sum(dim=1)
    factor = product / power.clamp(min=1e-6)
    return torch.where(power > 0.1, (factor - 1).abs(), 0.0).clamp(max=NO_MEASUREMENT)


def pause_error(arrival: Tensor, departure: Tensor, contact: Tensor, speed: Tensor, interval: float) -> Tensor:
    """(N, S) u/s^2: objects that stick at a contact, or leave before they arrive.

    Free intervals extrapolate to the moments at which a contact is reached (arrival) and was left (departure), both
    (N, S) in s; up to half a frame between the two is measurement. The rest, times the impact speed, is a displacement.
    (Objects that go into each other need time too; callers leave those to the penetration law.)
    """
    arrived, _, _ = around_contacts(arrival, contact)
    _, departed, _ = around_contacts(departure, contact)
    return ((departed - arrived).abs() - 0.5 * interval).clamp(min=0) * speed / interval**2


def reference_area(seen: Seen) -> Tensor:
    """(N, K) u^2: an object's full area, the upper quartile over frames (others may be hidden)."""
    return seen.area.quantile(0.75, dim=1)


def area_error(seen: Seen, expected: Tensor | float = 1.0) -> Tensor:
    """(N,) of the worst object: mean |area / full area - expected share| over frames; 1 when there never was one."""
    full = reference_area(seen)[:, None]
    # At most 1 a frame: a clip's error is then the share of frames in which an object is wholly wrong.
    deviation = (seen.area / full.clamp(min=1e-6) - expected).abs().clamp(max=1)
    return torch.where(full > seen.pixel**2, deviation, 1.0).mean(dim=1).amax(dim=1)


def around_contacts(speed: Tensor, contact: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Last free value before, and first free one after, each contact of intervals (N, S).

    Returns before, after (N, S) and where a contact begins with free intervals on both sides (N, S) bool.
    """
    count = speed.shape[1]
    places = torch.arange(count, device=speed.device).expand_as(contact)
    last = torch.where(contact, -1, places).cummax(dim=1).values
    last = torch.nn.functional.pad(last[:, :-1], (1, 0), value=-1)  # free interval before each, -1 for none
    first = torch.where(contact, count, places).flip(1).cummin(dim=1).values.flip(1)  # that or after, `count` for none
    begins = contact & (last >= 0) & (last == places - 1) & (first < count)
    return speed.gather(1, last.clamp(min=0)), speed.gather(1, first.clamp(max=count - 1)), begins


def predicted_contacts(gap: Tensor, pull: float) -> Tensor:
    """(N, T-1) bool: intervals in which a gap (N, T), moving freely under `pull` (u per interval^2), would close.

    Judged from the two frames before and, backwards in time, from the two frames after.
    """
    forward = 2 * gap[:, 1:-1] - gap[:, :-2] - pull  # (N, T-2): the gap of frames 2..T-1
    backward = 2 * gap[:, 1:-1] - gap[:, 2:] - pull  # the gap of frames 0..T-3
    pad = torch.nn.functional.pad
    return pad(forward < TOUCH, (1, 0)) | pad(backward < TOUCH, (0, 1))


def projectile(seen: Seen, interval: float) -> dict[str, Tensor]:
    centres, found = seen.centres[:, :, 0], seen.found[:, :, 0]
    radius = (reference_area(seen)[:, 0] / torch.pi).sqrt()
    x, y = centres.unbind(-1)
    gap = FLOOR - radius[:, None] - y
    contact = predicted_contacts(gap, GRAVITY * interval**2)
    seen_acceleration, valid = steps(centres, found, interval)
    free = ~(contact[:, 1:] | contact[:, :-1])
    lying = (gap[:, 2:].abs() < TOUCH) & (gap[:, 1:-1].abs() < TOUCH) & (gap[:, :-2].abs() < TOUCH)
    vertical = torch.where(free, seen_acceleration[..., 1] - GRAVITY, seen_acceleration[..., 1] * lying)
    residual = (seen_acceleration[..., 0] ** 2 + vertical**2).sqrt()
    # A flight's impact speed is a constant of its motion: each free interval gives it, as v^2 + 2 g (height left).
    speed = (y[:, 1:] - y[:, :-1]) / interval
    middle = (gap[:, 1:] + gap[:, :-1]) / 2 + GRAVITY * interval**2 / 8
    impact = (speed**2 + 2 * GRAVITY * middle).clamp(min=0).sqrt()
    before, after, bounce = around_contacts(impact, contact)
    bounce &= before > SLOWEST_IMPACT
    energy = (after / before.clamp(min=SLOWEST_IMPACT) - RESTITUTION).abs()
    moments = (torch.arange(speed.shape[1], device=y.device) + 0.5) * interval
    arrival, departure = moments + (impact - speed) / GRAVITY, moments - (impact + speed) / GRAVITY
    depth = (-gap).clamp(min=0).amax(dim=1)
    pause = pause_error(arrival, departure, contact, before, interval) * (depth < TOUCH)[:, None]
    residual, checked = torch.cat([residual, pause], dim=1), torch.cat([valid, bounce], dim=1)
    # The event: after falling, and near the floor, the ball rises again.
    lowest = y.cummax(dim=1).values
    near = FLOOR - radius[:, None] - lowest < 0.15
    rise = ((lowest - y) * near).amax(dim=1)
    fall = y.amax(dim=1) - y[:, 0]
    return {
        "acceleration": root_mean_square(residual, checked),
        "jump": largest(residual, checked),
        "gravity": strength_error(seen_acceleration[..., 1], torch.full_like(vertical, GRAVITY), valid & free),
        "energy": (energy * bounce).sum(dim=1) / bounce.sum(dim=1).clamp(min=1),
        "penetration": depth,
        "area": area_error(seen),
        "background": background_error(seen, plain_setting(seen)),
        "event": (rise / 0.05).clamp(0, 1) * (fall / 0.1).clamp(0, 1),
    }


def collision(seen: Seen, interval: float) -> dict[str, Tensor]:
    radius = (reference_area(seen) / torch.pi).sqrt()  # (N, 2)
    x, y = seen.centres.unbind(-1)  # (N, T, 2)
    found = seen.found.all(dim=2)
    order = torch.sign(x[:, :1, 1] - x[:, :1, 0])
    gap = (x[..., 1] - x[..., 0]) * order - radius.sum(dim=1, keepdim=True)  # (N, T)
    contact = predicted_contacts(gap, 0.0)
    seen_acceleration, valid = steps(seen.centres, found, interval)  # (N, T-2, 2, 2)
    free = ~(contact[:, 1:] | contact[:, :-1])
    # Through a contact each ball's speed may change, but not that of their common centre.
    each, both = (seen_acceleration[..., 0] ** 2).amax(dim=-1), seen_acceleration[..., 0].mean(dim=-1) ** 2
    sideways = torch.where(free, each, both)
    residual = (sideways + (seen_acceleration[..., 1] ** 2).amax(dim=-1)).sqrt()
    closing = -(gap[:, 1:] - gap[:, :-1]) / interval
    before, after, hit = around_contacts(closing, contact)
    hit &= before > SLOWEST_APPROACH
    safe = before.clamp(min=SLOWEST_APPROACH)
    energy = (-after / safe - COLLISION_RESTITUTION).abs()
    common = (x[:, 1:] - x[:, :-1]).mean(dim=-1) / interval
    common_before, common_after, _ = around_contacts(common, contact)
    momentum = (common_after - common_before).abs() / safe
    hits = hit.sum(dim=1).clamp(min=1)
    moments = (torch.arange(closing.shape[1], device=x.device) + 0.5) * interval
    middle = (gap[:, 1:] + gap[:, :-1]) / 2
    reach = middle / torch.where(closing.abs() > SLOWEST_APPROACH, closing, SLOWEST_APPROACH)  # < 0: was left before
    overlap = (-gap).clamp(min=0).amax(dim=1)
    parted = (after < -SLOWEST_APPROACH) & (overlap < TOUCH)[:, None]
    pause = pause_error(moments + reach, moments + reach, contact, safe, interval) * parted
    residual, checked = torch.cat([residual, pause], dim=1), torch.cat([valid, hit], dim=1)
    clearance = y + radius[:, None] - FLOOR
    nearest = gap.amin(dim=1)
    approach, parting = gap[:, 0] - nearest, gap[:, -1] - nearest
    return {
        "acceleration": root_mean_square(residual, checked),
        "jump": largest(residual, checked),
        "energy": (energy * hit).sum(dim=1) / hits,
        "momentum": (momentum * hit).sum(dim=1) / hits,
        "penetration": torch.maximum((clearance**2).mean(dim=(1, 2)).sqrt(), overlap),
        "area": area_error(seen),
        "background": background_error(seen, plain_setting(seen)),
        "event": ((approach - 0.03) / 0.03).clamp(0, 1) * (parting / 0.03).clamp(0, 1) * (nearest < 0.06),
    }


def pendulum(seen: Seen, interval: float) -> dict[str, Tensor]:
    found = seen.found[:, :, 0]
    right = seen.centres[:, :, 0, 0] - seen.aspect / 2
    down = seen.centres[:, :, 0, 1] - PIVOT_HEIGHT
    distance = (right**2 + down**2).sqrt()
    length = distance.median(dim=1).values.clamp(min=0.05)
    angle = torch.atan2(right, down)
    seen_acceleration, valid = steps(angle, found, interval)
    tangential, demanded = length[:, None] * seen_acceleration, -GRAVITY * angle[:, 1:-1].sin()
    residual = tangential - demanded
    # Energy above the lowest point, by interval, smoothed over three.
    speed = length[:, None] * (angle[:, 1:] - angle[:, :-1]) / interval
    middle = (angle[:, 1:] + angle[:, :-1]) / 2
    energy = 0.5 * speed**2 + GRAVITY * length[:, None] * (1 - middle.cos())
    energy = energy.unfold(1, 3, 1).mean(dim=-1)
    change = (energy.amax(dim=1) - energy.amin(dim=1)) / energy.median(dim=1).values.clamp(min=1e-3)
    swing = torch.minimum(right.amax(dim=1), -right.amin(dim=1))
    return {
        "acceleration": root_mean_square(residual, valid),
        "jump": largest(residual, valid),
        "gravity": strength_error(tangential, demanded, valid),
        "energy": change.clamp(max=NO_MEASUREMENT),
        "penetration": ((distance - length[:, None]) ** 2).mean(dim=1).sqrt(),
        "area": area_error(seen),
        "background": background_error(seen, plain_setting(seen)),
        "event": (swing / 0.05).clamp(0, 1) * (seen.rod / 0.05).clamp(0, 1),
    }


def ramp(seen: Seen, interval: float) -> dict[str, Tensor]:
    centres, found = seen.centres[:, :, 0], seen.found[:, :, 0]
    half_side = reference_area(seen)[:, 0].sqrt() / 2
    x, y = centres.unbind(-1)
    surface, foot, slope, descends = fit_ramp(seen)  # (N, W), (N,), (N,), (N,) +1 when it descends to the right
    ahead = (x - foot[:, None]) * descends[:, None]  # along the floor, > 0 beyond the foot
    on_ramp, on_floor = ahead < -CORNER, ahead > CORNER
    drive = torch.where(on_ramp, slope[:, None], 0.0)
    along = torch.stack([drive.cos() * descends[:, None], drive.sin()], dim=-1)  # (N, T, 2) unit tangent
    demanded = GRAVITY * (drive.sin() - FRICTION * drive.cos())
    seen_acceleration, valid = steps(centres, found, interval)
    moving = ((centres[:, 2:] - centres[:, :-2]) / (2 * interval)).norm(dim=-1) > 0.05
    demanded = demanded[:, 1:-1] * (moving | on_ramp[:, 1:-1])  # on the floor a block may lie still
    residual = (seen_acceleration - demanded[..., None] * along[:, 1:-1]).norm(dim=-1)
    tangential = (seen_acceleration * along[:, 1:-1]).sum(dim=-1)
    straight = (on_ramp[:, 2:] & on_ramp[:, :-2]) | (on_floor[:, 2:] & on_floor[:, :-2])
    # Work: kinetic energy = g (height lost) - mu g (distance covered horizontally), less what the fillet's grip costs,
    # a factor exp(-2 mu) for each radian turned. It holds on the whole path, so it also checks the corner's steps.
    velocity = (centres[:, 1:] - centres[:, :-1]) / interval
    kinetic = 0.5 * (velocity**2).sum(dim=-1)
    middle = (centres[:, 1:] + centres[:, :-1]) / 2
    balance = kinetic - GRAVITY * middle[..., 1] + FRICTION * GRAVITY * middle[..., 0] * descends[:, None]
    heading = torch.atan2(velocity[..., 1], velocity[..., 0] * descends[:, None])
    turned = (heading[:, 1:] - heading[:, :-1]).abs().clamp(max=1)
    lost = balance[:, 1:] - balance[:, :-1] + kinetic[:, 1:] * ((2 * FRICTION * turned).exp() - 1)
    covered = (velocity[:, 1:] + velocity[:, :-1]).norm(dim=-1) / 2 * interval
    residual = torch.where(straight, residual, lost.abs() / covered.clamp(min=0.02))
    first, last = slice(0, 3), slice(-3, None)
    bent = on_floor[:, last].all(dim=1) & on_ramp[:, first].all(dim=1)
    at_foot = kinetic + FRICTION * GRAVITY * (middle[..., 0] - foot[:, None]) * descends[:, None]  # past the fillet
    grip = at_foot[:, last].mean(dim=1) * ((2 * FRICTION * slope).exp() - 1) * bent
    change = balance[:, last].mean(dim=1) - balance[:, first].mean(dim=1) + grip
    drop = y[:, -1] - y[:, 0]
    columns = (torch.arange(surface.shape[1], device=y.device) + 0.5) * seen.pixel
    to_surface = ((columns - x[..., None]) ** 2 + (surface[:, None] - y[..., None]) ** 2).sqrt().amin(dim=-1)
    under = y > surface.gather(1, (x / seen.pixel).long().clamp(0, surface.shape[1] - 1))
    clearance = torch.where(under, -to_surface, to_surface) - half_side[:, None]
    raised = (FLOOR - surface).amax(dim=1)
    return {
        "acceleration": root_mean_square(residual, valid),
        "jump": largest(residual, valid),
        "gravity": strength_error(tangential, demanded, valid & straight),
        "energy": (change.abs() / (GRAVITY * drop.clamp(min=0.05))).clamp(max=NO_MEASUREMENT),
        "penetration": (clearance**2).mean(dim=1).sqrt(),
        "area": area_error(seen),
        "background": background_error(seen, ground_setting(seen, surface)),
        "event": ((drop - 0.03) / 0.04).clamp(0, 1) * ((raised - 0.04) / 0.06).clamp(0, 1),
    }


def occluder(seen: Seen, interval: float) -> dict[str, Tensor]:
    full = reference_area(seen)[:, 0]
    radius = (full / torch.pi).sqrt()[:, None]
    x, y = seen.centres[:, :, 0].unbind(-1)
    left, right = find_panel(seen)  # (N, 1) each
    whole = seen.area[:, :, 0] > 0.8 * full[:, None]
    shown = whole & seen.found[:, :, 0] & ((x + radius < left) | (x - radius > right))
    times = torch.arange(x.shape[1], device=x.device, dtype=x.dtype) * interval
    start, speed = fit_line(times, x, shown)
    path = start + speed * times  # (N, T)
    deviation = x - path
    # Seen accelerations, and deviations from one uniform motion as if they had built up within a frame.
    seen_acceleration, valid = steps(seen.centres[:, :, 0], shown, interval)
    residual = seen_acceleration.norm(dim=-1)
    step_error = root_mean_square(residual, valid, fewest=2)
    path_error = root_mean_square(deviation / interval**2, shown)
    before, after = shown & (x < left), shown & (x > right)
    _, speed_before = fit_line(times, x, before)
    _, speed_after = fit_line(times, x, after)
    first_leg = torch.where(speed > 0, speed_before, speed_after)
    second_leg = torch.where(speed > 0, speed_after, speed_before)
    both = (before.sum(dim=1) >= 2) & (after.sum(dim=1) >= 2)
    change = (second_leg / first_leg.abs().clamp(min=0.05) * first_leg.sign() - 1).abs()[:, 0]
    expected = visible_fraction(path, radius, left, right)
    clearance = (y + radius - FLOOR) * shown
    hidden = (seen.area[:, :, 0] < 0.3 * full[:, None]).any(dim=1)
    panel = (((right - left)[:, 0] - 0.06) / 0.06).clamp(0, 1)
    return {
        "acceleration": (step_error**2 + path_error**2).sqrt().clamp(max=NO_MEASUREMENT),
        "jump": largest(residual, valid),
        "energy": torch.where(both, change, 1.0).clamp(max=NO_MEASUREMENT),
        "penetration": ((clearance**2).sum(dim=1) / shown.sum(dim=1).clamp(min=1)).sqrt(),
        "area": area_error(seen, expected[..., None]),
        "background": background_error(seen, panel_setting(seen, left, right)),
        "event": panel * hidden * both,
    }


LAWS: dict[str, Callable[[Seen, float], dict[str, Tensor]]] = {
    law.__name__: law for law in (projectile, collision, pendulum, ramp, occluder)
}
