"""DP-SGD for one segment's weights: per-sample gradients, clipped, summed on an integer grid, noised, averaged.

Here: the bridge to opacus' per-sample gradients, where backward starts from a cut gradient instead of a loss; what a
module must be for the bound to hold; and the arithmetic from per-sample gradients to ``.grad``.  Not here: noise
(``randomness``), what it costs (``accounting``, by way of ``PrivateTraining.release``), when a segment steps
(``splitsec/segments.py``).

The algorithm is DP-SGD (Abadi et al. 2016, "Deep Learning with Differential Privacy", algorithm 1) without its
subsampling: each sample's gradient over all trainable parameters together is clipped to L2 norm C, the sum gets
Gaussian noise of standard deviation sigma = noise_multiplier * 2C, and only then do optimisers see it.  Replacing one
sample, its label and its cut gradient included, moves the sum by at most 2C, while everybody else's cut gradients stay
as they are.

Floating point gives nothing away (Mironov 2012, "On Significance of the Least Significant Bits for Differential
Privacy"): every clipped gradient is truncated towards zero to whole multiples of g = sigma / 2**21 before the sum, so
that the sum is one of integers, exact, in which a sample's share has norm at most C / g; then a rounded Gaussian is
added as an integer.  The rest is post-processing of that integer.
"""

from __future__ import annotations

import importlib
import logging
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final, Literal

import torch
from torch import nn
from torch.nn.parameter import UninitializedTensorMixin  # type: ignore[attr-defined]

from splitsec.privacy.errors import BadParameter, Unsupported
from splitsec.privacy.randomness import SCALE, NoiseSource, gaussian_integers
from splitsec.privacy.release import Gaussian

__all__ = ["PrivateTraining", "refuse_unfit"]

_STEPS: Final = SCALE // 2
"""Grid steps in C at noise multiplier 1, where sigma is 2C: ``gaussian_integers`` has SCALE = 2**21 to a sigma."""

_MARGIN: Final = 1 - 2**-20
"""Clip to this part of C.  Rounding of a norm over d coordinates, summed in float64, is below d * 2**-54: room to spare
below 2**32 coordinates."""

_SMALLEST_NOISE, _LARGEST_NOISE = 2.0**-32, 2.0**10  # a clipped gradient has 2**52 to 2**10 grid steps
_SMALLEST_CLIP, _LARGEST_CLIP = 1e-12, 1e12  # squares of float32 gradients over it stay finite in float64
_BLOCK: Final = 2**18  # coordinates worked on at once: 2 MiB of float64 stay in cache
_SAME: Final = 1e-4  # two passes over the same rows differ less; kernels that take turns differ by rounding only
_AGREE: Final = 1e-2  # part of the summed norms by which per-sample and ordinary gradients may differ: TF32 and less

_NORMS_OVER_BATCH: Final = (
    "normalises with statistics of the batch: the gradient of one sample then depends on all the others, so that "
    "clipping it bounds nobody's influence, and running statistics leave with the weights, without noise"
)
_RECURRENT: Final = {
    nn.LSTM: "opacus.layers.DPLSTM(..., batch_first=True)",
    nn.GRU: "opacus.layers.DPGRU(..., batch_first=True)",
    nn.RNN: "opacus.layers.DPRNN(..., batch_first=True)",
    nn.MultiheadAttention: "opacus.layers.DPMultiheadAttention(..., batch_first=True)",
}


class PrivateTraining:
    """A module whose optimiser only ever sees noised gradients.

    A step is: forward through ``module`` in training mode, backward from a gradient, ``privatise``, the optimiser's
    step.  Between backward and ``privatise`` parameters have no ``.grad`` at all, so that a step out of order changes
    nothing.  In evaluation, or without autograd, ``module`` is an ordinary module.

    The bound rests on gradient rows that are each one sample's own.  A loss that compares samples with each other
    (contrastive losses, NoPeek's term) breaks it unseen, and so does BatchNorm where the cut gradient is computed,
    unless what goes there has been released privately itself.
    """

    module: nn.Module
    """The module given, with hooks: forward goes through it; names and values of its state are what they were."""

    coordinates: int
    """Numbers in one sample's gradient: elements of all trainable parameters."""

    def __init__(
        self,
        module: nn.Module,
        *,
        clip: float,
        noise_multiplier: float,
        source: NoiseSource,
        loss_reduction: Literal["mean", "sum"] = "mean",
    ) -> None:
        """Hook ``module`` up; its trainable parameters from now on are those that are trainable now.

        ``clip``: C, the L2 norm that one sample's gradient may have.  ``noise_multiplier``: sigma / 2C.
        ``loss_reduction``: what backward starts from is the gradient of the ``mean`` over the step's samples of
        their losses, or of the ``sum``.  C bounds the gradient of one sample's own loss in both cases; ``.grad`` is
        the mean or the sum alike.

        Raises ``BadParameter``, and ``Unsupported`` where opacus is missing or the module unfit.
        """
        if not _SMALLEST_CLIP <= clip <= _LARGEST_CLIP:
            raise BadParameter(f"clip is {clip}, and must be from {_SMALLEST_CLIP} to {_LARGEST_CLIP}")
        if not _SMALLEST_NOISE <= noise_multiplier <= _LARGEST_NOISE:
            raise BadParameter(f"noise_multiplier is {noise_multiplier}, and must be from 2**-32 to 2**10")
        if loss_reduction not in ("mean", "sum"):
            raise BadParameter(f"loss_reduction is {loss_reduction!r}, and must be 'mean' or 'sum'")
        refuse_unfit(module)
        self.module = module
        self.clip = clip
        self.noise_multiplier = noise_multiplier
        self.loss_reduction = loss_reduction
        self._source = source
        self._parameters = _trainable(module)
        self.coordinates = sum(parameter.numel() for parameter in self._parameters.values())
        self._in_flight = False
        self._samples = 0
        self._looked = False
        self._ordinary: dict[str, torch.Tensor] = {}
        self._buffers: dict[str, tuple[int, int]] = {}
        try:
            # Kept: the hooks are its methods.  'sum' leaves gradients as they are; the scale is ours.
            self._hooks = _opacus("grad_sample").GradSampleModule(module, batch_first=True, loss_reduction="sum")
        except (NotImplementedError, ValueError) as error:
            raise Unsupported(f"opacus has no per-sample gradients for this module: {_first_line(error)}") from error
        self._layers = {name: layer for name, layer in module.named_modules() if _own_trainable(layer)}
        self._hooks.disable_hooks()  # but for a training step
        self._watch = _Watch(self)
        # Inputs of a first segment need no gradient, of which torch would warn at every layer's hook.
        warnings.filterwarnings("ignore", message="Full backward hook is firing when gradients are computed")
        module.register_forward_pre_hook(self._watch.before)
        module.register_forward_hook(self._watch.after)
        for name, parameter in self._parameters.items():
            parameter.register_post_accumulate_grad_hook(self._taker(name))  # type: ignore[no-untyped-call]

    @property
    def sigma(self) -> float:
        """Standard deviation of the noise on every coordinate of the sum."""
        return self.noise_multiplier * 2 * self.clip

    @property
    def release(self) -> Gaussian:
        """What one training use of one sample costs: once a step for each sample that was in it."""
        return Gaussian(self.noise_multiplier, self.coordinates)

    def state_dict(self) -> dict[str, Any]:
        """``module.state_dict()``: the plain module's names."""
        return self.module.state_dict()

    def privatise(self, rows: int) -> None:
        """Turn the per-sample gradients of the last backward into ``.grad`` of every trainable parameter.

        ``rows``: samples of the whole step, over all parties, by which the mean was taken: at least those that went
        through here.  Every trainable parameter gets noise, those that nobody's gradient reached as well.

        Raises ``BadParameter`` if a sample's gradient is not finite, and ``Unsupported`` if there are no gradients or
        they are not one row a sample.  Then nothing of the step is left, as after ``forget``.
        """
        try:
            noised = self._noised_sum(rows)
        finally:
            self.forget()
        step = self.sigma / SCALE / (rows if self.loss_reduction == "mean" else 1)
        sizes = [parameter.numel() for parameter in self._parameters.values()]
        for parameter, integers in zip(self._parameters.values(), torch.split(noised, sizes), strict=True):
            piece = integers.to(parameter.device, torch.float64) * step
            parameter.grad = piece.to(parameter.dtype).view_as(parameter)

    def forget(self) -> None:
        """Leave nothing behind of a forward or backward that will not be finished: no activations, no gradients."""
        for layer in self.module.modules():
            for name in ("activations", "max_batch_len"):  # where opacus keeps them
                layer.__dict__.pop(name, None)
        for parameter in self._parameters.values():
            parameter.__dict__.pop("_current_grad_sample", None)
            vars(parameter).update(grad_sample=None, _forward_counter=0)
            parameter.grad = None
        self._ordinary.clear()
        self._in_flight = False
        self._hooks.disable_hooks()

    # --- from per-sample gradients to integers

    def _noised_sum(self, rows: int) -> torch.Tensor:
        """The sum of clipped gradients plus noise in grid steps: int64 ``[coordinates]``."""
        if not self._in_flight or not self._ordinary:
            raise Unsupported("no gradients to make private: forward in training mode, backward, then privatise, once")
        if rows < self._samples:
            raise BadParameter(f"a step of {rows} samples, of which {self._samples} went through here")
        if self._samples * _STEPS / self.noise_multiplier >= 2.0**62:  # int64 could not hold the sum
            raise BadParameter(f"{self._samples} samples at noise_multiplier {self.noise_multiplier}: use more noise")
        integers = self._clipped_sum(rows)
        noise = gaussian_integers(self.coordinates, self._source)
        return integers.add_(noise.to(integers.device))

    def _clipped_sum(self, rows: int) -> torch.Tensor:
        """Each sample's gradient clipped to C and truncated to the grid, summed: int64 ``[coordinates]``."""
        samples = self._per_sample()
        units = (rows if self.loss_reduction == "mean" else 1) / self.clip  # gradients in units of C
        squares = torch.zeros(self._samples, dtype=torch.float64, device=next(iter(self._parameters.values())).device)
        apart: dict[str, torch.Tensor] = {}
        for name, gradients in samples.items():
            total = torch.zeros_like(gradients[0], dtype=torch.float64)
            for part in _blocks(gradients):
                wide = gradients[:, part].to(torch.float64, copy=True).mul_(units)
                total[part] = wide.sum(0)
                squares += wide.square_().sum(1).to(squares.device)
            ordinary = self._ordinary.get(name)
            apart[name] = total if ordinary is None else total.sub_(ordinary.flatten().to(torch.float64) * units)
        norms = squares.sqrt()
        if not bool(norms.isfinite().all()):
            raise BadParameter(
                "a sample's gradient is not finite: after clipping it would still turn every weight into NaN.  The "
                "step was dropped; look at the inputs and the cut gradients of the last batch"
            )
        self._must_agree(apart, float(norms.sum()))
        steps = (_MARGIN / norms).clamp_(max=1.0).mul_(units * (_STEPS / self.noise_multiplier))
        sums = []
        for name, parameter in self._parameters.items():
            total = torch.zeros(parameter.numel(), dtype=torch.int64, device=squares.device)
            gradients = samples.get(name, total[None, :0])
            for part in _blocks(gradients):
                wide = gradients[:, part].to(torch.float64, copy=True).mul_(steps[:, None].to(gradients.device))
                total[part] = wide.to(torch.int64).sum(0)  # the conversion truncates towards zero
            sums.append(total)
        return torch.cat(sums)

    def _per_sample(self) -> dict[str, torch.Tensor]:
        """Gradients ``[samples, numel]`` of the parameters that have any, as opacus left them."""
        found = {}
        for name, parameter in self._parameters.items():
            gradients = getattr(parameter, "grad_sample", None)
            if gradients is None and name not in self._ordinary:
                continue  # nobody's gradient came here: zeros
            if gradients is None:
                raise Unsupported(
                    f"{name!r} was used, but not by calling its layer in training mode, so that it has no gradients "
                    "by sample: call the layer itself, with positional arguments"
                )
            if isinstance(gradients, list) or len(gradients) != self._samples:
                raise Unsupported(f"{name!r} has not one gradient for each sample: {_ONE_ROW}")
            found[name] = gradients.detach().reshape(self._samples, -1)
        return found

    def _must_agree(self, apart: Mapping[str, torch.Tensor], norms: float) -> None:
        """Per-sample gradients must add up to what autograd found on its own."""
        for name, difference in apart.items():
            if float(difference.norm()) > _AGREE * norms:
                raise Unsupported(
                    f"the gradients of {name!r} by sample do not add up to its gradient: it is used in a way that "
                    "opacus does not see.  Call the layer itself, once, and change nothing that it read or returned"
                )

    def _taker(self, name: str) -> Callable[[torch.Tensor], None]:
        def take(parameter: torch.Tensor) -> None:
            """The ordinary gradient, which no optimiser may see."""
            gradient, parameter.grad = parameter.grad, None
            if gradient is not None and self._in_flight:
                earlier = self._ordinary.get(name)
                self._ordinary[name] = gradient if earlier is None else earlier + gradient

        return take

    # --- watching a forward

    def _before(self, arguments: Sequence[Any]) -> None:
        if self._in_flight:
            raise Unsupported(
                "a second forward before the gradients of the first came back: opacus would mix the samples of both.  "
                "With dp_sgd use `micro_batches: 1`; after a batch that was lost, forget it first"
            )
        if not self.module.training:
            return
        now = _trainable(self.module)
        if now.keys() != self._parameters.keys() or any(now[name] is not self._parameters[name] for name in now):
            raise Unsupported("other parameters are trainable than when training began: wrap the module anew")
        tensors = [argument for argument in arguments if isinstance(argument, torch.Tensor)]
        counts = {len(tensor) if tensor.dim() else 0 for tensor in tensors}
        if len(counts) != 1:
            raise Unsupported(f"inputs of {sorted(counts)} rows: {_ONE_ROW}")
        self.forget()
        self._samples = counts.pop()
        self._buffers = self._buffer_versions()
        if not self._looked:
            self._looked = self._look(arguments)
        self._in_flight = True
        self._hooks.enable_hooks()

    def _after(self) -> None:
        once = {id(p) for layer in self._layers.values() if not _recurrent(layer) for p in layer.parameters(False)}
        for name, parameter in self._parameters.items():
            if id(parameter) in once and vars(parameter).get("_forward_counter", 0) > 1:
                self.forget()
                raise Unsupported(
                    f"{name!r} was used more than once in one forward: its gradients by sample could then be paired "
                    "with the wrong activations.  Use a layer for each place"
                )
        self._buffers_must_stay()

    def _buffer_versions(self) -> dict[str, tuple[int, int]]:
        return {name: (id(buffer), buffer._version) for name, buffer in self.module.named_buffers()}

    def _buffers_must_stay(self) -> None:
        now = self._buffer_versions()
        changed = sorted(name for name in now.keys() | self._buffers.keys() if now.get(name) != self._buffers.get(name))
        if changed:
            self.forget()
            raise Unsupported(
                f"forward changes the buffers {', '.join(map(repr, changed))}, which leave with the weights: what they "
                "learn from samples would go without noise.  Use a layer that keeps no running values"
            )

    def _look(self, arguments: Sequence[Any]) -> bool:
        """Go forward twice, with the second half of the samples exchanged: the first half must not notice.

        This finds samples that mix (a mean over the batch, say) and a batch that is not dimension 0 somewhere inside.
        It is a check of mistakes, not a proof.  False where the batch cannot tell.
        """
        half = self._samples // 2
        index = torch.arange(self._samples)
        index[half:] -= half
        altered = [a[index.to(a.device)] if isinstance(a, torch.Tensor) else a for a in arguments]
        if half == 0 or all(
            torch.equal(a, b) for a, b in zip(arguments, altered, strict=True) if isinstance(a, torch.Tensor)
        ):
            return False
        before, after = self._seen(arguments), self._seen(altered)
        for (name, one), (_, other) in zip(before, after, strict=False):
            if one.dim() == 0 or len(one) != self._samples or one.shape != other.shape:
                raise Unsupported(f"{name} has not one row for each sample: {_ONE_ROW}")
            if _differ(one[:half], other[:half]):
                raise Unsupported(
                    f"{name} of one sample changes with the other samples in the batch: clipping one sample's gradient "
                    "then bounds nobody's influence.  Compute each row from its own sample alone"
                )
        return True

    def _seen(self, arguments: Sequence[Any]) -> list[tuple[str, torch.Tensor]]:
        """What every trainable layer is given, and what the module returns, from the same random numbers."""
        seen: list[tuple[str, torch.Tensor]] = []

        def keep(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
            def hook(_: nn.Module, given: tuple[Any, ...]) -> None:
                seen.extend((name, value.detach().clone()) for value in given if isinstance(value, torch.Tensor))

            return hook

        named = {name: f"what layer {name!r} is given" if name else "the input" for name in self._layers}
        handles = [layer.register_forward_pre_hook(keep(named[name])) for name, layer in self._layers.items()]
        device = next(iter(self._parameters.values())).device
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
                produced = self.module(*arguments)
        finally:
            for handle in handles:
                handle.remove()
        self._buffers_must_stay()
        outputs = produced.values() if isinstance(produced, Mapping) else [produced]
        return seen + [("the output", value) for value in outputs if isinstance(value, torch.Tensor)]


_ONE_ROW: Final = "dimension 0 must hold the samples, one row each, in every layer with weights"


class _Watch:
    """The hooks of a module, kept apart from the generator: a copy of the module watches nothing and may not train."""

    def __init__(self, training: PrivateTraining | None) -> None:
        self.training = training

    def before(self, module: nn.Module, arguments: tuple[Any, ...]) -> None:
        if not torch.is_grad_enabled():
            return
        if self.training is not None:
            self.training._before(arguments)
        elif module.training:
            raise Unsupported("a copy of a module under private training: its gradients would not be private")

    def after(self, module: nn.Module, _: tuple[Any, ...], __: Any) -> None:
        if self.training is not None and module.training and torch.is_grad_enabled():
            self.training._after()

    def __deepcopy__(self, memo: dict[int, Any]) -> _Watch:
        return _Watch(None)


# --- what is fit


def refuse_unfit(module: nn.Module) -> None:
    """Raise ``Unsupported``, with every reason, unless a sample's gradient can be told from the others' in ``module``.

    Refused: layers that normalise over the batch, trained or frozen; running statistics; layers without a per-sample
    gradient in opacus, and uses of layers for which it is wrong; parameters outside layers, or in two of them; layers
    that work in place; and whatever else opacus' own validator refuses.  Frozen layers of other kinds are fine.
    """
    problems: dict[str, list[str]] = {}
    for name, reason in (*_unfit(module), *_shared(module)):
        problems.setdefault(reason, []).append(name)
    if problems:
        raise Unsupported(
            "the module is not fit for dp_sgd: "
            + "; ".join(f"{', '.join(names)} {reason}" for reason, names in problems.items())
        )
    if not _trainable(module):
        raise Unsupported("the module is not fit for dp_sgd: it has nothing to train")


def _unfit(module: nn.Module) -> Iterator[tuple[str, str]]:
    samplers = _opacus("grad_sample").GradSampleModule.GRAD_SAMPLERS
    validators = _opacus("validators").ModuleValidator.VALIDATORS
    for path, layer in module.named_modules():
        name = f"{path!r} ({type(layer).__name__})" if path else f"the module itself ({type(layer).__name__})"
        reason = _layer_problem(layer)
        if reason is None and _own_trainable(layer):
            if type(layer) not in samplers and not _recurrent(layer):
                known = ", ".join(sorted(kind.__name__ for kind in samplers if kind.__module__.startswith("torch.")))
                reason = (
                    f"holds weights ({', '.join(_own_trainable(layer))}) and opacus has no per-sample gradient for it: "
                    f"put weights into layers of exactly these kinds ({known}), or register one with "
                    "opacus.grad_sample.register_grad_sampler"
                )
            elif type(layer) in validators:
                found = [_first_line(error) for error in validators[type(layer)](layer)]
                reason = f"is refused by opacus: {'; '.join(found)}" if found else None
        if reason is not None:
            yield name, reason


def _layer_problem(layer: nn.Module) -> str | None:
    """Why this layer cannot be private, in words that follow its name; None if nothing is known against it."""
    kind = next((kind for kind in _RECURRENT if isinstance(layer, kind)), None)
    if isinstance(layer, nn.modules.batchnorm._BatchNorm):  # InstanceNorm is none
        return f"{_NORMS_OVER_BATCH}: use GroupNorm, also where it is frozen"
    if getattr(layer, "track_running_stats", False):
        return "keeps running statistics, which leave with the weights, without noise: use track_running_stats=False"
    if any(isinstance(p, UninitializedTensorMixin) for p in layer._parameters.values()):
        return "has no shape yet: use the layer that is not lazy"
    if getattr(layer, "inplace", False) is True:
        return "changes what other layers returned in place, where per-sample gradients are read: use inplace=False"
    if isinstance(layer, nn.Embedding) and layer.max_norm is not None:
        return "shortens weights that the batch uses, without noise: use max_norm=None"
    if not _own_trainable(layer):
        return None
    if kind is not None:
        return f"mixes time steps inside one kernel, without per-sample gradients: use {_RECURRENT[kind]}"
    if isinstance(layer, nn.EmbeddingBag):
        return "takes samples of all lengths in one row: use Embedding, and a sum or mean over dimension 1"
    if isinstance(layer, nn.Embedding) and (layer.scale_grad_by_freq or layer.sparse or layer.padding_idx is not None):
        return (
            "has gradients that opacus computes without scale_grad_by_freq, sparse and padding_idx: use none of these, "
            "and a mask for padding"
        )
    if isinstance(layer, nn.modules.conv._ConvNd) and layer.padding_mode != "zeros":
        return "has gradients that opacus computes as with padding_mode='zeros': use that, or a pad layer before it"
    if isinstance(layer, nn.LayerNorm) and getattr(layer, "bias", None) is None:
        return "has no bias, which opacus expects: use bias=True"
    if type(layer).__module__.startswith("torch.nn.") and not {*_own_trainable(layer)} <= {"weight", "bias"}:
        return "has its weight made from others (weight or spectral normalisation): use the layer without"
    if any(p.is_complex() for p in layer.parameters(recurse=False)):
        return "has complex weights: use real ones"
    return None


def _shared(module: nn.Module) -> Iterator[tuple[str, str]]:
    places: dict[int, list[str]] = {}
    for path, layer in module.named_modules(remove_duplicate=False):
        if isinstance(layer, _opacus("layers.dp_rnn").DPRNNBase):
            continue  # gives the weights of its time steps a second name
        for name, parameter in layer.named_parameters(prefix=path, recurse=False):
            if parameter.requires_grad and not isinstance(parameter, UninitializedTensorMixin):
                places.setdefault(parameter.untyped_storage().data_ptr() or id(parameter), []).append(name)
    for names in places.values():
        if len(names) > 1:
            yield " and ".join(map(repr, names)), "share weights: give each place its own"


def _own_trainable(layer: nn.Module) -> list[str]:
    return [name for name, parameter in layer.named_parameters(recurse=False) if parameter.requires_grad]


def _trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def _recurrent(layer: nn.Module) -> bool:
    """One of opacus' own recurrent layers, which it follows through their time steps."""
    module = _opacus("layers.dp_rnn")
    return isinstance(layer, (module.RNNLinear, module.DPRNNBase))


def _blocks(gradients: torch.Tensor) -> Iterator[slice]:
    """All columns of ``[samples, numel]``, so many at a time that their float64 stays in cache."""
    width = max(1, _BLOCK // len(gradients))
    return (slice(start, start + width) for start in range(0, gradients.shape[1], width))


def _differ(one: torch.Tensor, other: torch.Tensor) -> bool:
    if not one.is_floating_point():
        return not torch.equal(one, other)
    return one.numel() > 0 and bool((one - other).abs().max() > _SAME * one.abs().max())


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]


def _opacus(part: str) -> Any:
    """``opacus.PART``, loaded when it is first needed (three seconds), without its settings for everybody's log."""
    root = logging.getLogger()
    handlers = list(root.handlers)
    try:
        return importlib.import_module(f"opacus.{part}")
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "opacus":
            raise
        raise Unsupported("dp_sgd needs opacus: pip install 'splitsec[privacy]'") from error
    finally:
        for handler in set(root.handlers) - set(handlers):
            root.removeHandler(handler)


assert math.log2(_STEPS / _SMALLEST_NOISE) <= 52  # a clipped coordinate, in grid steps, is exact in float64
