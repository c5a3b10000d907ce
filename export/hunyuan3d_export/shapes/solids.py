"""Closed surfaces that can be sampled uniformly and that know the exact signed distance of any point to themselves.

Curved surfaces are defined by facets along one parameter: a sphere here is a polygon of revolution, a helix is a tube around
a polyline. The distances are therefore exact for the surface that is sampled. Smooth and faceted surfaces differ by less
than 4e-4. Every solid is scaled to bounding radius 1 about its origin.
"""

from __future__ import annotations

import dataclasses
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from hunyuan3d_client.shapes.codec import Floats

Array = NDArray[np.float64]
Flags = NDArray[np.bool_]


@dataclasses.dataclass(frozen=True)
class Topology:
    """components: closed surfaces. euler_number: vertices - edges + faces of any mesh of them all, 2 for each ball, 0 for a ring."""

    components: int
    euler_number: int


class Surface(Protocol):
    """A surface in space."""

    def sample(self, count: int, random: np.random.Generator) -> Array:
        """Points spread uniformly by area, [count, 3]."""

    def distance(self, points: Floats) -> Array:
        """Unsigned distance of points [..., 3] to the surface, [...]."""

    def inside(self, points: Floats) -> Flags:
        """Whether each of points [..., 3] is inside the solid that the surface encloses, [...]."""

    def scaled(self, across: float, along: float) -> Surface:
        """The surface with x and y multiplied by `across`, z by `along`."""

    def radius(self) -> float:
        """The largest distance of the surface to the origin."""

    def volume(self) -> float:
        """The volume of the solid."""

    def topology(self) -> Topology:
        """The number of the surface's parts and its Euler number."""

    def reach(self) -> float:
        """The largest x of the surface."""


def signed_distance(surface: Surface, points: Floats) -> Array:
    """Distance of points [..., 3] to the surface, positive inside the solid and negative outside, [...]."""
    distance = surface.distance(points)
    return np.where(surface.inside(points), distance, -distance)


def _segment_distance(points: Array, starts: Array, ends: Array) -> Array:
    """Distance of points [N, D] to the nearest of the segments [S, D], [N]."""
    along = ends - starts  # [S, D]
    length_squared = np.maximum((along**2).sum(-1), 1e-30)
    offset = points @ along.T - (starts * along).sum(-1)  # [N, S]
    fraction = np.clip(offset / length_squared, 0.0, 1.0)
    to_start = (points**2).sum(-1)[:, None] - 2 * points @ starts.T + (starts**2).sum(-1)
    squared = to_start - 2 * fraction * offset + fraction**2 * length_squared
    return np.sqrt(np.maximum(squared.min(-1), 0.0))


@dataclasses.dataclass(frozen=True)
class Polyhedron:
    """The surface of a convex polyhedron as triangles, [F, 3 corners, 3]."""

    triangles: Array

    def sample(self, count: int, random: np.random.Generator) -> Array:
        a, b, c = np.moveaxis(self.triangles, 1, 0)
        area = np.linalg.norm(np.cross(b - a, c - a), axis=-1)
        face = random.choice(len(area), count, p=area / area.sum())
        u, v = np.sqrt(random.random(count))[:, None], random.random(count)[:, None]
        return (1 - u) * a[face] + u * (1 - v) * b[face] + u * v * c[face]

    def distance(self, points: Floats) -> Array:
        flat = np.asarray(points, np.float64).reshape(-1, 3)
        best = np.min([self._face_distance(flat, face) for face in self.triangles], axis=0)
        return best.reshape(points.shape[:-1])

    def inside(self, points: Floats) -> Flags:
        """The points that lie, for every face, on the side where the polyhedron's centre is."""
        flat = np.asarray(points, np.float64).reshape(-1, 3)
        first = self.triangles[:, 0]
        normals = np.cross(self.triangles[:, 1] - first, self.triangles[:, 2] - first)  # [F, 3]
        centre = self.triangles.reshape(-1, 3).mean(axis=0)
        sides = np.sign(((centre - first) * normals).sum(-1))  # [F]
        heights = (flat @ normals.T - (first * normals).sum(-1)) * sides  # [N, F]
        return (heights > 0).all(-1).reshape(points.shape[:-1])

    @staticmethod
    def _face_distance(points: Array, face: Array) -> Array:
        normal = np.cross(face[1] - face[0], face[2] - face[0])
        edges = np.roll(face, -1, axis=0) - face  # [3, 3]
        inward = np.cross(normal, edges)  # each edge's direction into the face
        inside = (points @ inward.T >= (face * inward).sum(-1)).all(-1)
        to_plane = np.abs((points - face[0]) @ normal) / np.linalg.norm(normal)
        return np.where(inside, to_plane, _segment_distance(points, face, np.roll(face, -1, axis=0)))

    def scaled(self, across: float, along: float) -> Polyhedron:
        return Polyhedron(self.triangles * [across, across, along])

    def radius(self) -> float:
        return float(np.linalg.norm(self.triangles, axis=-1).max())

    def volume(self) -> float:
        """The sum of the tetrahedra from the centre to each face."""
        corners = self.triangles - self.triangles.reshape(-1, 3).mean(axis=0)
        return float(np.abs(np.linalg.det(corners)).sum() / 6)

    def topology(self) -> Topology:
        return Topology(1, 2)

    def reach(self) -> float:
        return float(self.triangles[..., 0].max())


@dataclasses.dataclass(frozen=True)
class Revolution:
    """A polyline turned about z. profile: its corners as (distance to the axis, z), [P, 2]."""

    profile: Array

    def sample(self, count: int, random: np.random.Generator) -> Array:
        starts, ends = self.profile[:-1], self.profile[1:]
        area = (starts[:, 0] + ends[:, 0]) * np.linalg.norm(ends - starts, axis=-1)
        chosen = random.choice(len(area), count, p=area / area.sum())
        (r0, r1), u = (starts[chosen, 0], ends[chosen, 0]), random.random(count)
        # The area grows with the radius along a segment, so u goes through the inverse of the area's cumulative share.
        # This form of the inverse is stable for r0 = r1.
        fraction = u * (r0 + r1) / np.maximum(r0 + np.sqrt(r0**2 + u * (r1**2 - r0**2)), 1e-30)
        rho, z = (starts[chosen] + fraction[:, None] * (ends - starts)[chosen]).T
        angle = random.uniform(0, 2 * np.pi, count)
        return np.stack([rho * np.cos(angle), rho * np.sin(angle), z], axis=-1)

    def distance(self, points: Floats) -> Array:
        return _segment_distance(_polar(points), self.profile[:-1], self.profile[1:]).reshape(points.shape[:-1])

    def inside(self, points: Floats) -> Flags:
        """The points whose ray along z, in the half plane of the profile, crosses the profile an odd number of times.

        A profile that ends on the axis is closed by the axis, which such a ray never crosses.
        """
        rho, z = _polar(points).T[:, :, None]
        (r0, z0), (r1, z1) = self.profile[:-1].T, self.profile[1:].T
        spans = (r0 <= rho) != (r1 <= rho)  # [N, S]
        crossing = z0 + (rho - r0) / np.where(r1 == r0, 1.0, r1 - r0) * (z1 - z0)
        odd = (spans & (crossing > z)).sum(-1) % 2 == 1
        return odd.reshape(points.shape[:-1])

    def scaled(self, across: float, along: float) -> Revolution:
        return Revolution(self.profile * [across, along])

    def radius(self) -> float:
        return float(np.linalg.norm(self.profile, axis=-1).max())

    def volume(self) -> float:
        """The sum of the frusta between each segment and the axis, with the sign of the segment's direction along z."""
        (r0, z0), (r1, z1) = self.profile[:-1].T, self.profile[1:].T
        return float(abs((np.pi / 3 * (z1 - z0) * (r0**2 + r0 * r1 + r1**2)).sum()))

    def topology(self) -> Topology:
        return Topology(1, 2 if self.profile[0, 0] == 0 else 0)

    def reach(self) -> float:
        return float(self.profile[:, 0].max())


def _polar(points: Floats) -> Array:
    """Points [..., 3] -> distance to the z axis and z, [N, 2]."""
    flat = np.asarray(points, np.float64).reshape(-1, 3)
    return np.stack([np.hypot(flat[:, 0], flat[:, 1]), flat[:, 2]], axis=-1)


@dataclasses.dataclass(frozen=True)
class HelixTube:
    """All points at distance `thickness` from a helix about z, so the tube ends in round caps."""

    coil: float
    half_height: float
    thickness: float
    turns: float = 2.0
    segments: int = 160

    def _curve(self, u: Array) -> Array:
        """The centre line at u in [0, 1], [..., 3]."""
        angle = 2 * np.pi * self.turns * u
        return np.stack([self.coil * np.cos(angle), self.coil * np.sin(angle), self.half_height * (2 * u - 1)], axis=-1)

    def _corners(self) -> Array:
        return self._curve(np.linspace(0.0, 1.0, self.segments + 1))

    def sample(self, count: int, random: np.random.Generator) -> Array:
        corners = self._corners()
        points = np.empty((0, 3))
        while len(points) < count:
            # The capsules of all segments are sampled by area. A point inside a neighbour's capsule is not on the surface.
            segment = random.integers(self.segments, size=2 * count)
            starts, along = corners[segment], (corners[1:] - corners[:-1])[segment]
            candidates = self._capsules(starts, along, random)
            outside = self._centre_distance(candidates) > self.thickness - 1e-9
            points = np.concatenate([points, candidates[outside]])
        return points[:count]

    def _capsules(self, starts: Array, along: Array, random: np.random.Generator) -> Array:
        """One point per segment [N, 3], uniform on the segment's capsule."""
        length = np.linalg.norm(along, axis=-1, keepdims=True)
        axis = along / length
        direction = random.standard_normal(starts.shape)
        sphere = direction / np.linalg.norm(direction, axis=-1, keepdims=True)
        radial = direction - (direction * axis).sum(-1, keepdims=True) * axis
        radial /= np.linalg.norm(radial, axis=-1, keepdims=True)
        wall = starts + random.random(length.shape) * along + self.thickness * radial
        cap = starts + ((sphere * axis).sum(-1, keepdims=True) > 0) * along + self.thickness * sphere
        on_wall = random.random(length.shape) < length / (length + 2 * self.thickness)
        return np.where(on_wall, wall, cap)

    def _centre_distance(self, points: Array) -> Array:
        corners = self._corners()
        return _segment_distance(points, corners[:-1], corners[1:])

    def distance(self, points: Floats) -> Array:
        flat = np.asarray(points, np.float64).reshape(-1, 3)
        return np.abs(self._centre_distance(flat) - self.thickness).reshape(points.shape[:-1])

    def inside(self, points: Floats) -> Flags:
        flat = np.asarray(points, np.float64).reshape(-1, 3)
        return (self._centre_distance(flat) < self.thickness).reshape(points.shape[:-1])

    def scaled(self, across: float, along: float) -> HelixTube:
        """The helix with its centre line scaled. The tube stays round: only a uniform scaling changes its thickness."""
        thickness = self.thickness * across if across == along else self.thickness
        return dataclasses.replace(self, coil=self.coil * across, half_height=self.half_height * along, thickness=thickness)

    def radius(self) -> float:
        return float(np.hypot(self.coil, self.half_height)) + self.thickness

    def volume(self) -> float:
        """That of a tube around the centre line (Weyl's formula: its length times the cross-section) and of two half balls."""
        length = np.linalg.norm(np.diff(self._corners(), axis=0), axis=-1).sum()
        return float(np.pi * self.thickness**2 * length + 4 / 3 * np.pi * self.thickness**3)

    def topology(self) -> Topology:
        return Topology(1, 2)

    def reach(self) -> float:
        return self.coil + self.thickness


@dataclasses.dataclass(frozen=True)
class Pair:
    """Two copies of a surface at half size, side by side along x."""

    single: Surface
    size: float = 0.5
    offset: float = 0.5

    def sample(self, count: int, random: np.random.Generator) -> Array:
        points = self.size * self.single.sample(count, random)
        points[:, 0] += random.choice([-self.offset, self.offset], count)
        return points

    def distance(self, points: Floats) -> Array:
        return self.size * np.minimum(*(self.single.distance(each) for each in self._in_each(points)))

    def inside(self, points: Floats) -> Flags:
        return np.logical_or(*(self.single.inside(each) for each in self._in_each(points)))

    def _in_each(self, points: Floats) -> list[Array]:
        """The points [..., 3] in the coordinates of the two copies."""
        shift = np.array([self.offset, 0.0, 0.0])
        return [(np.asarray(points, np.float64) + sign * shift) / self.size for sign in (-1, 1)]

    def scaled(self, across: float, along: float) -> Pair:
        return dataclasses.replace(self, single=self.single.scaled(across, along))

    def radius(self) -> float:
        return self.offset + self.size * self.single.radius()

    def volume(self) -> float:
        return 2 * self.size**3 * self.single.volume()

    def topology(self) -> Topology:
        single = self.single.topology()
        return Topology(2 * single.components, 2 * single.euler_number)

    def reach(self) -> float:
        return self.offset + self.size * self.single.reach()

    def gap(self) -> float:
        """The distance between the two copies along x."""
        return 2 * (self.offset - self.size * self.single.reach())


def normalised(surface: Surface) -> Surface:
    """The surface scaled uniformly to bounding radius 1."""
    factor = 1 / surface.radius()
    return surface.scaled(factor, factor)
