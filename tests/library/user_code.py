"""Models, data and loaders as another project has them."""

import contextlib
import random
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, default_collate

COUNT, CLASSES = 23, 3


@dataclass
class Output:
    """What Hugging Face models return, in short."""

    logits: Tensor
    hidden_states: tuple = ()


class TextModel(nn.Module):
    """A model with three inputs of different dtypes that returns an object with logits."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(6, 4)
        self.dropout = nn.Dropout(0.5)
        self.classifier = nn.Linear(6, CLASSES)

    def forward(self, input_ids, attention_mask, values):
        words = self.embedding(input_ids) * attention_mask[..., None]
        pooled = torch.tanh(words.sum(1) / attention_mask.sum(1, keepdim=True))
        return Output(self.classifier(self.dropout(torch.cat([pooled, values], 1))))


class TextData(Dataset):
    def __init__(self, dtype=torch.float64):
        generator = torch.Generator().manual_seed(3)
        self.ids = torch.randint(0, 6, (COUNT, 5), generator=generator)
        self.mask = (torch.arange(5) <= torch.randint(0, 5, (COUNT, 1), generator=generator)).long()
        self.values = torch.randn(COUNT, 2, generator=generator, dtype=dtype)
        self.labels = torch.randint(0, CLASSES, (COUNT,), generator=generator)

    def __len__(self):
        return COUNT

    def __getitem__(self, i):
        return {"input_ids": self.ids[i], "attention_mask": self.mask[i], "values": self.values[i],
                "labels": self.labels[i], "idx": i}  # fmt: skip


class ImageData(Dataset):
    """Random vectors as ``(x, y, index)`` or ``(x, y)``."""

    def __init__(self, indexed=True, binary=False):
        generator = torch.Generator().manual_seed(5)
        self.x = torch.randn(COUNT, 4, generator=generator, dtype=torch.float64)
        self.y = torch.randint(0, 2 if binary else CLASSES, (COUNT,), generator=generator)
        self.indexed = indexed

    def __len__(self):
        return COUNT

    def __getitem__(self, i):
        return (self.x[i], self.y[i], i) if self.indexed else (self.x[i], self.y[i])


class Wrapped(nn.Module):
    """Another model's logits in a dict, from the keyword ``pixel_values``."""

    def __init__(self, model):
        super().__init__()
        self.inner = model

    def forward(self, pixel_values):
        return {"logits": self.inner(pixel_values), "loss": None}


def seeded(build, seed):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build().double()


def image_model(seed=0, outputs=CLASSES):
    """BatchNorm with statistics, dropout, and one module that stays in eval mode while the others train."""
    model = seeded(
        lambda: nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(), nn.Linear(6, outputs)),
        seed,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed + 100)
        model(torch.randn(50, 4, dtype=torch.float64) * 2 + 1)
    model[1].eval()
    return model


def text_model(seed=0):
    return seeded(TextModel, seed)


def shuffled(data, batch_size=5, collate_fn=None):
    generator = torch.Generator().manual_seed(1)
    return DataLoader(data, batch_size, shuffle=True, generator=generator, collate_fn=collate_fn)


def trimmed(items):
    """A batch of texts without the positions that are padding in all of them, so that lengths differ by batch."""
    batch = default_collate(items)
    length = int(batch["attention_mask"].sum(1).max())
    return {**batch, **{name: batch[name][:, :length] for name in ("input_ids", "attention_mask")}}


@contextlib.contextmanager
def untouched(loader, *models):
    """Check that the block leaves models, gradients, modes and random number generators as they were."""
    for model in models:
        for i, p in enumerate(model.parameters()):
            p.grad = None if i % 2 else torch.full_like(p, 0.5)

    def state():
        found = [torch.get_rng_state().clone(), torch.from_numpy(np.random.get_state()[1].astype(np.int64))]
        found += [torch.tensor(random.getstate()[1])]
        generator = getattr(loader, "generator", None)
        found += [generator.get_state().clone()] if generator is not None else []
        for model in models:
            found += [t.detach().clone() for t in model.state_dict().values()]
            found += [torch.tensor(module.training) for module in model.modules()]
            found += [torch.tensor(p.requires_grad) for p in model.parameters()]
            found += [torch.zeros(0) if p.grad is None else p.grad.clone() for p in model.parameters()]
        return found

    before = state()
    yield
    after = state()
    assert len(before) == len(after)
    assert all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert not any(module._forward_hooks or module._forward_pre_hooks for m in models for module in m.modules())
