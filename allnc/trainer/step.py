"""One step of training: forward, loss, backward, update; the batch whole, or through the encoder in parts.

In parts (`train.micro_batch`) all images of a batch still contrast together, and only the graph of one part is held:

    1. every part passes the encoder without a graph, and its features are kept;
    2. heads and loss take the features of the whole batch; their backward gives the gradient of every feature;
    3. every part passes the encoder again, with its graph and the random numbers of the first time (dropout), and
       takes the gradient of its features from there.

Gradients are those of the whole batch, except where a layer of the encoder looks at other images: BatchNorm takes the
statistics of each part (ghost batch normalisation), in both passes the same. Heads see the whole batch.

Source: Gao et al., Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup (RepL4NLP 2021).
"""

from __future__ import annotations

import torch
from torch import Tensor

from allnc.data import Batch
from allnc.losses import LossOutput
from allnc.models import ModelOutput
from allnc.models.normalisation import averaged_statistics, resting_statistics
from allnc.trainer.run import Run
from allnc.trainer.runtime import dropout_state, restore_dropout_state


def train_step(run: Run, batch: Batch, *, progress: float) -> dict[str, Tensor]:
    """Move the weights by one batch; return its loss and the loss's parts.

    Args:
        run: model, loss and optimiser.
        batch: this process's images of the step.
        progress: share of training done, in [0, 1].
    """
    backward = _backward if run.passes == 1 and not run.retrains else _backward_in_parts
    total, parts = backward(run, batch, progress)
    clip = run.config.train.grad_clip
    if clip is not None:
        run.scaler.unscale_(run.optimizer)
        torch.nn.utils.clip_grad_norm_(run.model.parameters(), clip)
    run.scaler.step(run.optimizer)
    run.scaler.update()
    run.optimizer.zero_grad(set_to_none=True)
    return {"loss": total.detach(), **parts}


def forward(run: Run, batch: Batch, *, progress: float) -> LossOutput:
    """Return the loss of a batch, which passes the model at once and under autocast, and the loss's parts."""
    with run.autocast():
        output = run.network(_pixels(run, batch.images), train_uniform=run.loss.trains_uniform(progress))
    return loss_of(run, output, batch, progress=progress)


def loss_of(run: Run, output: ModelOutput, batch: Batch, *, progress: float) -> LossOutput:
    """Return the loss of the model's outputs, which it takes in the types they come in and adds up in float32.

    That of mixed images is the mixture of those at both of their labels.
    """
    own = _loss_at(batch.labels, run, output, batch, progress)
    if batch.other_labels is None:
        return own
    other, share = _loss_at(batch.other_labels, run, output, batch, progress), batch.share
    parts = {name: share * value + (1 - share) * other.parts[name] for name, value in own.parts.items()}
    return LossOutput(share * own.total + (1 - share) * other.total, parts)


def _loss_at(labels: Tensor, run: Run, output: ModelOutput, batch: Batch, progress: float) -> LossOutput:
    """Return the loss where the images have these labels."""
    heads = {"z": output.z, "h": output.h, "prototypes": output.prototypes}  # those that the loss reads are there
    return run.loss(
        output.features,
        labels,
        run.model.class_vectors,
        (batch.branch(output.logits_uniform, rebalance=False), batch.branch(labels, rebalance=False)),
        (batch.branch(output.logits_rebalance, rebalance=True), batch.branch(labels, rebalance=True)),
        progress,
        num_views=run.config.data.views,
        **{name: rows for name, rows in heads.items() if rows is not None},
    )


def _backward(run: Run, batch: Batch, progress: float) -> LossOutput:
    """Leave the gradients of a batch."""
    loss = forward(run, batch, progress=progress)
    run.scaler.scale(loss.total).backward()
    return loss


def _backward_in_parts(run: Run, batch: Batch, progress: float) -> LossOutput:
    """Leave the gradients of a batch that passes the encoder in `run.passes` parts."""
    encoder, device = run.model.encoder, run.device
    parts = batch.parts(run.passes)
    before, found = [], []
    with resting_statistics(encoder), torch.no_grad():
        for rows in parts:
            before.append(dropout_state(device))
            with run.autocast():  # one for each part: autocast keeps weights of 16 bits, here without a graph
                found.append(encoder(_pixels(run, batch.images[rows])))
    features = torch.empty_like(torch.cat(found))
    features[torch.cat(parts)] = torch.cat(found)
    del found

    trains = not run.retrains and any(parameter.requires_grad for parameter in encoder.parameters())
    features.requires_grad_(trains)
    with run.autocast():
        output = run.model.heads(features, train_uniform=run.loss.trains_uniform(progress))
    loss = loss_of(run, output, batch, progress=progress)
    run.scaler.scale(loss.total).backward()
    gradient, after = features.grad, dropout_state(device)
    del output, features

    if gradient is not None:  # else all of the encoder is frozen, or rests
        with averaged_statistics(encoder):
            for rows, state in zip(parts, before, strict=True):
                restore_dropout_state(state, device)
                with run.autocast():
                    again = encoder(_pixels(run, batch.images[rows]))
                again.backward(gradient[rows])
        restore_dropout_state(after, device)
    run.processes.average([p.grad for p in run.model.parameters() if p.grad is not None])
    return loss


def _pixels(run: Run, images: Tensor) -> Tensor:
    return run.loader.pixels(images.contiguous(memory_format=run.memory))
