"""The client's trainable weights: probes in place, updates from scalars, and the digest that proves them equal.

The device holds one over its memory-mapped shard; the cloud holds a mirror; merge replays one from the base. Its owner
calls it from one thread at a time; the threads of its own share a pass over the weights and are done when it returns.

An update is a sum of directions, or in first-order training the gradient itself (estimates.py). What must always hold:
every weight is a multiple of its tensor's g inside the exact range, at θ and at any probe; exact_range.py knows whether
an update keeps it. Then sums are exact, a probe leaves no trace, and two machines have the same bits
(protocol/README.md, sections "Lattice" and "Updates").
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from hosl_protocol.arithmetic import lattice
from hosl_protocol.arithmetic.directions import LARGEST_ENTRY, Distribution, Stream, uniforms
from hosl_protocol.arithmetic.perturbation import TERMS_PER_PASS, LatticeTensor, Recipe, Term, add_directions
from hosl_protocol.arithmetic.rotation import GradientLayout
from hosl_protocol.exceptions import HoslError, IrreversibleError
from hosl_protocol.run.manifest import Manifest
from hosl_protocol.run.settings import ClientOptimizer, RunSettings
from hosl_protocol.weights.adamw import LARGEST_ESTIMATE, AdamW
from hosl_protocol.weights.estimates import DirectionEstimate, Estimate, GradientEstimate, UpdateRecord
from hosl_protocol.weights.exact_range import Coarsening, ExactRange
from hosl_protocol.weights.state import ClientState

THREADED_ABOVE = 1 << 20
"""Elements from which threads pay."""

PORTION = 1 << 16
"""Steps, one for each coefficient and tensor, that a replay holds in memory: so few that a device has room for them."""


@dataclass(frozen=True)
class ProbePoint:
    """Where a probe stands: θ + sign·ε·z(round, direction)."""

    round: int
    direction: int
    sign: int


class ClientWeights:
    """Trainable tensors with their optimizer state at `applied_round`."""

    def __init__(
        self,
        tensors: Sequence[LatticeTensor],
        *,
        seed: int,
        probe_step: float | None,
        optimizer: ClientOptimizer,
        distribution: Distribution = "rademacher",
        gradient_bits: int | None = None,
        threads: int = 1,
    ) -> None:
        """`probe_step` is None where the run makes no probes, `gradient_bits` where updates are sums of directions."""
        self.optimizer = optimizer
        self.applied_round = 0

        self._recipe = Recipe(seed, distribution)
        self._largest_entry = LARGEST_ENTRY[distribution]
        self._range = ExactRange(tensors, probe_step, self._largest_entry)
        self._layout: GradientLayout | None = None
        if gradient_bits is not None:
            self._layout = GradientLayout([tensor.values.size for tensor in tensors], gradient_bits)
        self._base_round = 0
        self._point: ProbePoint | None = None

        self._adamw = AdamW(self.tensors, optimizer) if optimizer.optimizer == "adamw" else None
        is_large = self.elements > THREADED_ABOVE and threads > 1
        self._executor = ThreadPoolExecutor(threads, "directions") if is_large else None

    @property
    def tensors(self) -> Sequence[LatticeTensor]:
        """The trainable tensors, on their lattices as these are now."""
        return self._range.tensors

    @property
    def coarsenings(self) -> Sequence[Coarsening]:
        """Re-lattice events so far, in order."""
        return self._range.coarsenings

    @property
    def elements(self) -> int:
        """d_c, the number of trainable parameters."""
        return sum(tensor.values.size for tensor in self.tensors)

    def close(self) -> None:
        """Stop the threads."""
        if self._executor is not None:
            self._executor.shutdown()

    def probe(self, point: ProbePoint | None) -> None:
        """Move the weights to a probe point, or back to θ (None); one pass, whatever point they stand at."""
        terms = []
        if self._point is not None:
            terms.append(self._probe_term(self._point, -1))
        if point is not None:
            terms.append(self._probe_term(point, +1))
        # Gaussian entries are rounded after they are scaled: twice the step is not twice the entry.
        if self._point != point:
            self._add(terms if self._recipe.distribution == "gaussian" else _merge(terms))
        self._point = point

    def _probe_term(self, point: ProbePoint, factor: int) -> Term:
        steps = [factor * point.sign * step for step in self._range.probe_steps]
        return Term(point.round, point.direction, steps)

    def _add(self, terms: Sequence[Term]) -> None:
        add_directions(self.tensors, terms, self._recipe, self._executor)

    def apply(self, updates: Iterable[UpdateRecord]) -> None:
        """Apply the updates of consecutive rounds; SGD adds as many in one pass as the exact range surely holds.

        They are taken from an iterator a portion at a time. Raises LatticeError where the weights have diverged, and
        HoslError for an update that is not the next one's; the weights then stand at `applied_round`.
        """
        self.probe(None)

        for portion in self._portions(updates):
            self._check_updates(portion)
            if self._adamw is not None:
                for update in portion:
                    self._apply_adamw(self._adamw, update)
            else:
                self._apply_sgd(portion, +1)

    def _portions(self, updates: Iterable[UpdateRecord]) -> Iterator[list[UpdateRecord]]:
        """Yield rounds of PORTION steps at most, in whole passes where they fill some; but one round at least."""
        # A pass adds TERMS_PER_PASS directions at once; a portion that ends within one would waste the rest of it.
        passes = max(1, PORTION // max(1, len(self.tensors)) // TERMS_PER_PASS)
        portion: list[UpdateRecord] = []
        coefficients = 0

        for update in updates:
            size = max(1, update.coefficients.size)
            if portion and coefficients + size > passes * TERMS_PER_PASS:
                yield portion
                portion, coefficients = [], 0
            portion.append(update)
            coefficients += size

        if portion:
            yield portion

    def _check_updates(self, updates: Sequence[UpdateRecord]) -> None:
        for expected, update in enumerate(updates, self.applied_round + 1):
            if update.round != expected:
                raise HoslError(f"update of round {update.round}, expected round {expected}")
            if not (np.isfinite(update.coefficients).all() and math.isfinite(update.learning_rate)):
                raise HoslError(f"update of round {update.round} holds a number that is not finite")
            found = update.coefficients.size, update.codes.size
            if self._layout is not None and found != (self._layout.scales, self._layout.codes):
                wanted = f"expected {self._layout.scales} and {self._layout.codes}"
                raise HoslError(f"update of round {update.round} has {found[0]} scales and {found[1]} codes, {wanted}")

    def _apply_sgd(self, updates: Sequence[UpdateRecord], sign: int) -> None:
        """θ ← θ + sign · Σ coefficient·z, the device's SGD; sign -1 takes updates back.

        What one pass might not hold exactly goes in halves, down to single rounds.
        """
        if self._layout is not None:
            for update in updates:
                self._add_gradient(self._gradient(update, self._layout), sign)
            return

        terms = self._sgd_terms(updates, sign)
        if not self._range.tighten_to_fit(self._growths(terms)):
            if len(updates) > 1:
                self._apply_sgd(updates[: len(updates) // 2], sign)
                self._apply_sgd(updates[len(updates) // 2 :], sign)
                return
            if sign > 0:
                self._range.coarsen(self._growths(terms), updates[0].round)
                terms = self._sgd_terms(updates, sign)
            # Taking one round back passes only sums that were inside the range when it was applied.

        self._add(terms)
        self._range.grow(self._growths(terms))
        self.applied_round += sign * len(updates)

    def _add_gradient(self, estimate: GradientEstimate, sign: int) -> None:
        """SGD of one round whose update carries the gradient itself, times minus the rate."""
        largest, round_ = estimate.largest(self.tensors), estimate.update.round

        def growths() -> list[float]:
            # Rounding moves a step by half of g at most.
            return [step + lattice.spacing(t.exponent) for step, t in zip(largest, self.tensors, strict=True)]

        if not self._range.tighten_to_fit(growths()) and sign > 0:
            self._range.coarsen(growths(), round_)
        for tensor in self.tensors:
            estimate.add_to(tensor, sign)
        self._range.grow(growths())
        self.applied_round += sign

    def _apply_adamw(self, adamw: AdamW, update: UpdateRecord) -> None:
        """One round's step of AdamW, with the update's estimate for its gradient."""
        rate = update.learning_rate
        largest = self._largest_estimate(update)
        if not largest <= LARGEST_ESTIMATE:
            raise HoslError(f"update of round {update.round} is an estimate of {largest:.3g}: AdamW cannot square it")

        def growths() -> list[float]:
            return adamw.growths(self._range.bounds, self.tensors, rate)

        # Decay moves a weight in proportion to its size: with the true maxima the growth is smaller, too.
        if not self._range.tighten_to_fit(growths()) and not self._range.tighten_to_fit(growths()):
            self._range.coarsen(growths(), update.round)
        growth = growths()
        # Made only now: the terms of directions depend on the lattices.
        adamw.step(self.tensors, self._estimate(update), rate)
        self._range.grow(growth)
        self.applied_round = update.round

    def _estimate(self, update: UpdateRecord) -> Estimate:
        if self._layout is not None:
            return self._gradient(update, self._layout)
        return DirectionEstimate(self._estimate_terms(update), self._recipe)

    def _largest_estimate(self, update: UpdateRecord) -> float:
        """Bound the magnitudes of the update's estimate."""
        if self._layout is not None:
            return max(self._gradient(update, self._layout).largest(self.tensors), default=0.0)
        return float(np.abs(update.coefficients).sum(dtype=np.float64)) * self._largest_entry

    def _gradient(self, update: UpdateRecord, layout: GradientLayout) -> GradientEstimate:
        return GradientEstimate(update, layout, self._recipe.seed)

    def revert(self, updates: Sequence[UpdateRecord]) -> None:
        """Take back the newest updates (SGD), given in ascending order: the same bits as before them.

        Raises IrreversibleError, and changes nothing, for AdamW, across a re-lattice event and across a loaded state.
        """
        if self._adamw is not None:
            raise IrreversibleError("AdamW's updates cannot be taken back")
        self.probe(None)

        # All that could forbid it comes before anything changes.
        for expected, update in zip(range(self.applied_round, -1, -1), reversed(updates), strict=False):
            if update.round != expected:
                raise HoslError(f"take back of round {update.round}, expected round {expected}")
        if updates and updates[0].round <= self._base_round:
            raise IrreversibleError(f"the weights were loaded as they stood after round {self._base_round}")
        if self.coarsenings and updates and self.coarsenings[-1].round >= updates[0].round:
            last = self.coarsenings[-1]
            raise IrreversibleError(f"round {last.round} made the lattice of {last.tensor} coarser")

        # Sums on the lattice are exact, so that subtracting gives the former bits, in whatever portions.
        for portion in self._portions(reversed(updates)):
            self._apply_sgd(portion, -1)

    def _growths(self, terms: Sequence[Term]) -> list[float]:
        """Bound how far `terms` can move a weight of each tensor."""
        if not terms:
            return [0.0] * len(self.tensors)
        steps_CT = np.array([term.steps for term in terms])  # coefficient, tensor
        growths: list[float] = (self._largest_entry * np.abs(steps_CT).sum(axis=0)).tolist()
        return growths

    def _sgd_terms(self, updates: Sequence[UpdateRecord], sign: int) -> list[Term]:
        """One term for each direction of each update, its steps rounded to the lattices with the seed's own chances."""
        places = [(update.round, direction) for update in updates for direction in range(update.coefficients.size)]
        if not places:
            return []

        coefficients_C = np.concatenate([update.coefficients for update in updates]).astype(np.float64)
        count = len(self.tensors)
        # A chance for each coefficient and tensor, from the seed: every machine rounds the same way.
        chances_CT = np.array([uniforms(self._recipe.seed, *place, Stream.ROUNDING, count) for place in places])
        exponents_T = np.array([tensor.exponent for tensor in self.tensors], np.intc)
        corrections_T = np.array([self._range.correction(tensor.index) for tensor in self.tensors])
        steps_CT = lattice.round_stochastically(coefficients_C[:, None] * corrections_T, exponents_T, chances_CT)
        rows: list[list[float]] = (sign * steps_CT).tolist()
        return [Term(*place, row) for place, row in zip(places, rows, strict=True)]

    def _estimate_terms(self, update: UpdateRecord) -> list[Term]:
        return [
            Term(
                update.round, direction, [coefficient * self._range.correction(tensor.index) for tensor in self.tensors]
            )
            for direction, coefficient in enumerate(update.coefficients.tolist())
        ]

    def resolution(self, update: UpdateRecord) -> float:
        """Compute the smallest |c|/g of an SGD update; below 1 a step survives rounding only in expectation.

        Of an update that is a gradient it says nothing: infinite.
        """
        coefficients = [abs(value) for value in update.coefficients.tolist() if value]
        if self._adamw is not None or self._layout is not None or not coefficients or not self.tensors:
            return math.inf
        coarsest = max(
            lattice.spacing(tensor.exponent) / self._range.correction(tensor.index) for tensor in self.tensors
        )
        return float(min(coefficients) / coarsest)

    def digest(self) -> str:
        """SHA-256 of the trainable tensors in order, little-endian, then AdamW's step count and moments."""
        return self.state().digest()

    def state(self) -> ClientState:
        """Return where the weights stand at `applied_round`, shared: to copy is the caller's part."""
        self.probe(None)
        return ClientState(
            self.applied_round,
            {tensor.name: tensor.values for tensor in self.tensors},
            {tensor.name: tensor.exponent for tensor in self.tensors},
            self._adamw.state(self.tensors) if self._adamw is not None else None,
        )

    def load_state(self, state: ClientState) -> None:
        """Continue from what `state` gave; rounds up to its own can't be taken back from here.

        Raises HoslError, and changes nothing, where it is of other tensors or of another optimizer.
        """
        self._check_state(state)

        names = [tensor.name for tensor in self.tensors]
        self._range.load([state.exponents[name] for name in names], [state.weights[name] for name in names])
        if self._adamw is not None and state.moments is not None:
            self._adamw.load_state(self.tensors, state.moments)

        self._point = None
        self.applied_round = self._base_round = state.round

    def _check_state(self, state: ClientState) -> None:
        sizes = {tensor.name: tensor.values.size for tensor in self.tensors}
        parts = [state.weights]
        if (state.moments is None) != (self._adamw is None):
            raise HoslError(f"the state is not one of {self.optimizer.optimizer}")
        if state.moments is not None:
            if state.moments.steps != state.round:
                raise HoslError(f"the state is of round {state.round} and of {state.moments.steps} steps")
            parts += [state.moments.first, state.moments.second]

        if any({name: values.size for name, values in part.items()} != sizes for part in parts):
            raise HoslError("the state is of other tensors than those that train here")
        for tensor in self.tensors:
            exponent = state.exponents.get(tensor.name)
            if exponent is None or not self._range.allows(tensor, exponent):
                raise HoslError(f"the state has no lattice for {tensor.name} that a run may use")


def _merge(terms: Sequence[Term]) -> list[Term]:
    """Make one term of two that share a direction: from θ + εz to θ - εz is one step of -2εz."""
    if len(terms) == 2 and (terms[0].round, terms[0].direction) == (terms[1].round, terms[1].direction):
        return [replace(terms[0], steps=[a + b for a, b in zip(terms[0].steps, terms[1].steps, strict=True)])]
    return list(terms)


def make_client_weights(
    manifest: Manifest, tensors: dict[str, npt.NDArray[np.float32]], settings: RunSettings, threads: int = 1
) -> ClientWeights:
    """Make the client's weights over `tensors` (by name, changed in place); empty where the run freezes the client."""
    entries = manifest.trainable if settings.traits.trains_client else ()
    flat = []

    for index, entry in enumerate(entries):
        view = tensors[entry.name].reshape(-1)
        assert entry.exponent is not None
        assert np.shares_memory(view, tensors[entry.name])
        flat.append(LatticeTensor(entry.name, index, view, entry.exponent))

    return ClientWeights(
        flat,
        seed=settings.seed,
        probe_step=settings.probe_step if settings.traits.probes else None,
        optimizer=settings.client,
        distribution=settings.distribution,
        gradient_bits=settings.gradient_bits if settings.traits.sends_gradient else None,
        threads=threads,
    )
