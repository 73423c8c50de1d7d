"""Neural collapse at any layers of any network, through forward hooks: one pass for the moments, one for NC4.

Legend: N images of a batch, F features of a layer, C classes; c channels, h x w positions, T tokens, d their width.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from allnc.metrics.accumulate import CollapseAccumulator, Gather, merged_over, predictions_of
from allnc.metrics.measures import Center, Moments, Within
from allnc.metrics.ood import OODAccumulator
from allnc.ops._common import check_choice

Positions = Literal["mean", "flatten"]

_MOST_ENTRIES = 1 << 27  # 1 GiB in float64: the largest scatter matrix of a layer
_SAME = 1e-5  # relative difference up to which a layer's output is the classifier's input, e.g. by another sum's order


class LayerCollapse(NamedTuple):
    """What `collapse_of` returns of a layer."""

    measures: dict[str, float]  # as `collapse` with spectral; of the weight only where the classifier reads the layer
    moments: Moments  # for `by_shot`
    weight: Tensor | None  # [C, F] class vectors where the classifier reads the layer's output, else None


def collapse_of(
    model: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    *,
    layers: Sequence[str] | Literal["all"],
    num_classes: int | None = None,
    class_counts: Tensor | Sequence[int] | None = None,
    classifier: str | None = None,
    weight: Tensor | None = None,
    logits: Callable[[Any], Tensor] | None = None,
    positions: Positions = "mean",
    channels_last: bool = False,
    nc4: bool = True,
    spectral: bool = True,
    ood: Iterable[Any] | None = None,
    gather: Gather | None = None,
    center: Center = "class",
    within: Within = "classes",
) -> dict[str, LayerCollapse]:
    """Neural collapse of the outputs of a network's layers, all layers in one pass.

    The network is in evaluation mode meanwhile; its modes, its hooks and torch's random numbers are afterwards what
    they were, also after an error. Sums are kept on the CPU in float64.

    Args:
        model: any module; images go to the device of its first parameter.
        loader: yields (images, labels [N] int64 in [0, C)), without augmentation; anything that can be iterated again,
            as a DataLoader or a list, unless nc4 is False.
        layers: names as in `model.named_modules()`; "all": every module below the model that runs once in a forward
            pass and returns one floating tensor of a row per image.
        num_classes: C; None takes it from class_counts or from the weight.
        class_counts: [C] samples of each class that the loader yields; needed for many classes, see
            `CollapseAccumulator`.
        classifier: name of the module whose input the class vectors are compared with. Layers whose output, after
            `positions`, is that input get the measures of the weight and NC3, others none; None: no layer.
        weight: [C, F] class vectors; None takes the classifier's `weight`.
        logits: takes the logits [N, C] from the model's output; None where it is they.
        positions: outputs [N, F] are measured as they are; [N, c, h, w] (and [N, c, ...]) are averaged over positions
            and [N, T, d] over tokens ("mean"), or taken whole ("flatten").
        channels_last: outputs of four dimensions are [N, h, w, c], as those of Swin.
        nc4: a second pass counts how often the nearest class mean at a layer is not what the network predicts.
        spectral: also the measures of spectra, as in `collapse`.
        ood: batches of images of no class, or (images, anything); each layer then has nc5 and nc5_vectors.
        gather: for several processes, each with a share of the images in its loader: returns what each of them passes,
            any object that can be pickled, in one order on all (`torch.distributed.all_gather_object`). All get the
            measures of all images; class_counts are those of all. ood is not shared: each process sees the same.
        center, within: as in `collapse`.

    Returns:
        The layers in the order in which they run.

    Raises:
        ValueError: a name that is no layer's, a layer that runs never or more than once or whose output cannot be
            measured, a loader that cannot be iterated twice, or what `CollapseAccumulator` refuses.

    Source: NC1 by layer: He & Su, A Law of Data Separation in Deep Learning, PNAS 2023; NC1 to NC4 by layer: Rangamani
        et al., Feature Learning in Deep Classifiers through Intermediate Neural Collapse, ICML 2023.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> batches = [(torch.randn(30, 4), torch.arange(30) % 3)]
        >>> found = collapse_of(model, batches, layers=["0", "1"], classifier="2")
        >>> list(found), "nc3" in found["0"].measures, "nc3" in found["1"].measures
        (['0', '1'], False, True)
    """
    check_choice("positions", positions, ("mean", "flatten"))
    modules = {name: module for name, module in model.named_modules() if name}
    names = list(modules) if layers == "all" else list(dict.fromkeys(layers))
    for name in [*names, *([] if classifier is None else [classifier])]:
        _check_name(name, modules)
    if weight is None and classifier is not None:
        weight = _weight_of(modules[classifier], classifier)
    if weight is not None:
        weight = weight.detach().cpu()
    counts = None if class_counts is None else torch.as_tensor(class_counts).cpu()
    if num_classes is None:
        sized = counts if counts is not None else weight
        if sized is None:
            raise ValueError("num_classes must be given: neither class_counts nor a classifier says how many there are")
        num_classes = len(sized)
    if nc4 and isinstance(loader, Iterator):
        raise ValueError(
            "loader must be iterated twice for NC4; got an iterator, which ends: give a list, or nc4=False"
        )

    first = next(iter([*model.parameters(), *model.buffers()]), torch.empty(0))
    with _measured(model, first.device), _Taps(modules, names, classifier, positions, channels_last) as taps:
        sums: dict[str, CollapseAccumulator] = {}
        read: set[str] = set()  # layers that the classifier reads
        for images, labels in loader:
            model(images.to(first.device))
            outputs = taps.take(len(labels), drop=layers == "all" and not sums)
            if not sums:
                sums = {
                    name: CollapseAccumulator(num_classes, x.shape[1], class_counts=counts, within=within)
                    for name, x in outputs.items()
                }
                read = {name for name, x in outputs.items() if taps.feeds_classifier(x)}
            for name, x in outputs.items():
                sums[name].update(x, labels.cpu())
        if gather is not None:
            sums, read = _merged(sums, read, gather, counts, within)
            taps.keep(list(sums))  # a process without images knows them only now
        if not sums:
            raise ValueError("loader must yield at least one batch, and layers name at least one layer; got none")
        if nc4:
            for images, labels in loader:
                predictions = _predictions(model(images.to(first.device)), logits, len(labels))
                for name, x in taps.take(len(labels)).items():
                    sums[name].count_disagreement(x, predictions)
            if gather is not None:
                seen = gather({name: total.nearest for name, total in sums.items()})
                for name, total in sums.items():
                    total.nearest = torch.stack([own[name] for own in seen]).sum(0)
        orthogonal = {} if ood is None else {name: OODAccumulator(total.means) for name, total in sums.items()}
        for batch in [] if ood is None else ood:
            images = batch[0] if isinstance(batch, (tuple, list)) else batch
            model(images.to(first.device))
            for name, x in taps.take(len(images)).items():
                orthogonal[name].update(x)
    found = {}
    for name, total in sums.items():
        own = weight if name in read else None
        measures = total.compute(own, center=center, spectral=spectral)
        if name in orthogonal:
            measures |= orthogonal[name].compute()
        found[name] = LayerCollapse(measures, total.moments, own)
    return found


def _merged(
    own: dict[str, CollapseAccumulator], read: set[str], gather: Gather, counts: Tensor | None, within: Within
) -> tuple[dict[str, CollapseAccumulator], set[str]]:
    """Return what all processes have seen of the layers, and which the classifier reads, alike on all processes.

    Raises:
        ValueError: they have seen other layers.
    """
    parts = [part for part in gather((read, list(own))) if part[1]]  # a process may have no images
    if not parts:
        return {}, set()
    for _, names in parts:
        if names != parts[0][1]:
            raise ValueError(f"all processes must see the same layers; got {names} and {parts[0][1]}")
    merged = {}
    for name in parts[0][1]:  # one after the other: all together, they may be gigabytes
        merged[name] = merged_over(gather, own.pop(name, None), class_counts=counts, within=within)
    return merged, parts[0][0]


@contextmanager
def _measured(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Evaluation mode without gradients; each module's own mode and torch's random numbers come back."""
    modes = {module: module.training for module in model.modules()}
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.no_grad():
        model.eval()
        try:
            yield
        finally:
            for module, training in modes.items():
                module.training = training


class _Taps:
    """Hooks that keep what layers return, as rows [N, F], from one forward pass to the next; a context manager."""

    def __init__(
        self,
        modules: dict[str, nn.Module],
        names: list[str],
        classifier: str | None,
        positions: Positions,
        channels_last: bool,
    ) -> None:
        self.modules, self.names, self.classifier = modules, names, classifier
        self.positions, self.channels_last = positions, channels_last
        self.outputs: dict[str, Tensor | str] = {}  # or why there is none
        self.input: Tensor | None = None  # of the classifier
        self.hooks: dict[str, Any] = {}  # of layers
        self.handles: list[Any] = []  # of the classifier

    def __enter__(self) -> _Taps:
        for name in self.names:
            self.hooks[name] = self.modules[name].register_forward_hook(self._hook(name))
        if self.classifier is not None:
            self.handles.append(self.modules[self.classifier].register_forward_pre_hook(self._keep_input))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in (*self.hooks.values(), *self.handles):
            handle.remove()

    def _hook(self, name: str) -> Callable[[nn.Module, Any, Any], None]:
        def keep(_: nn.Module, __: Any, output: Any) -> None:
            again = name in self.outputs
            self.outputs[name] = "it runs more than once in a forward pass" if again else self._rows(output)

        return keep

    def _keep_input(self, _: nn.Module, inputs: tuple[Any, ...]) -> None:
        self.input = inputs[0].detach().clone() if inputs and isinstance(inputs[0], Tensor) else None

    def _rows(self, output: Any) -> Tensor | str:
        """The output as rows, a copy, because the next layer may write into it; or why it has none."""
        if not isinstance(output, Tensor) or not output.is_floating_point():
            return f"it returns {type(output).__name__}, not one floating tensor"
        if output.dim() < 2:
            return f"it returns a tensor of shape {list(output.shape)}, without features"
        if self.positions == "mean" and output.dim() > 2:
            tokens = output.dim() == 3 or (output.dim() == 4 and self.channels_last)
            axis = tuple(range(1, output.dim() - 1)) if tokens else tuple(range(2, output.dim()))
            rows = output.detach().double().mean(axis)
        else:
            rows = output.detach().flatten(1).clone()
        if rows.shape[1] ** 2 > _MOST_ENTRIES:
            size = rows.shape[1] ** 2 * 8 / 2**30
            return f"its {rows.shape[1]} features would need a matrix of {size:.0f} GiB; average over positions"
        return rows

    def take(self, num_rows: int, *, drop: bool = False) -> dict[str, Tensor]:
        """Return the rows of the pass since the last call, on the CPU; `drop` forgets layers that have none."""
        outputs, self.outputs = self.outputs, {}
        found = {}
        for name in [*outputs, *(name for name in self.names if name not in outputs)]:  # in the order of the pass
            rows = outputs.get(name, "it does not run in a forward pass")
            if isinstance(rows, Tensor) and len(rows) != num_rows:
                rows = f"it returns {len(rows)} rows for {num_rows} images"
            if isinstance(rows, Tensor):
                found[name] = rows.cpu()
            elif drop:
                self.hooks.pop(name).remove()
            else:
                raise ValueError(f"layers must name layers that can be measured; {name!r} cannot: {rows}")
        self.names = list(found)
        return found

    def keep(self, names: list[str]) -> None:
        """Forget all layers but these."""
        for name in set(self.hooks) - set(names):
            self.hooks.pop(name).remove()
        self.names = names

    def feeds_classifier(self, rows: Tensor) -> bool:
        """Whether these rows are what the classifier got in the same pass."""
        got = self.input
        if got is None or got.shape != rows.shape:
            return False
        got = got.to(rows)
        return bool(torch.linalg.vector_norm(got - rows) <= _SAME * torch.linalg.vector_norm(got))


def _check_name(name: str, modules: dict[str, nn.Module]) -> None:
    if name not in modules:
        near = difflib.get_close_matches(name, modules, n=3, cutoff=0.4)
        near += [other for other in modules if other.endswith(f".{name}") and other not in near][:3]
        listed = ", ".join(map(repr, near or list(modules)[:5])) or "none: the model has no layers"
        raise ValueError(f"layers must be of model.named_modules(); got {name!r}. Near it: {listed}")


def _weight_of(module: nn.Module, name: str) -> Tensor:
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2:
        raise ValueError(f"weight must be given: the classifier {name!r} has no weight of shape [C, F]")
    return weight


def _predictions(output: Any, logits: Callable[[Any], Tensor] | None, num_rows: int) -> Tensor:
    found = output if logits is None else logits(output)
    if not isinstance(found, Tensor) or found.dim() != 2 or len(found) != num_rows:
        got = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise ValueError(f"logits must be [N, C]; got {got}. Give logits=lambda output: ..., or nc4=False")
    return predictions_of(found).cpu()
