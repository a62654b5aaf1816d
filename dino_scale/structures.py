"""The nouns that travel between data, model, loss and evaluation.

Shape letters: B images in a microbatch, H x W padded height and width, T boxes of all images together,
N detections of one image.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kernels.transfer import to_device


@dataclass(frozen=True)
class Targets:
    """Ground truth of a microbatch, ragged: images follow one another in `labels` and `boxes`.

    labels: (T,) int64, contiguous class ids (never raw category ids).
    boxes: (T, 4) float32, centre x, centre y, width, height, divided by the width and height of the image itself
        (without padding).
    counts: boxes per image, length B, summing to T; plain integers, so that shapes are known without a device sync.
    """

    labels: Tensor
    boxes: Tensor
    counts: tuple[int, ...]

    def per_image(self) -> list[tuple[Tensor, Tensor]]:
        """(labels, boxes) of each image, as views."""
        sizes = list(self.counts)
        return list(zip(self.labels.split(sizes), self.boxes.split(sizes), strict=True))

    def to(self, device: torch.device | str) -> Targets:
        return replace(self, labels=to_device(self.labels, device), boxes=to_device(self.boxes, device))

    def pin_memory(self) -> Targets:
        """In page-locked memory, from which a copy to a GPU does not hold up the process. Needs a GPU."""
        return replace(self, labels=self.labels.pin_memory(), boxes=self.boxes.pin_memory())

    def record_stream(self, stream: torch.cuda.Stream) -> None:
        """Tell the allocator that work on `stream` reads these tensors. On a GPU only."""
        self.labels.record_stream(stream)
        self.boxes.record_stream(stream)


@dataclass(frozen=True)
class Batch:
    """One microbatch, as the loader hands it over.

    images: (B, 3, H, W) uint8 RGB, each image in the top left corner, zeros to the right and below.
    sizes: height and width in pixels of each image inside `images`, length B.
    original_sizes: height and width of each image on disk, before augmentation, length B.
    sample_ids: position of each sample in the dataset's index, length B.
    image_ids: raw image id of each sample, as in the annotation file, length B.
    targets: ground truth; boxes of images without any are an empty slice.
    replaced: images that stand in for ones that could not be read.
    """

    images: Tensor
    sizes: tuple[tuple[int, int], ...]
    original_sizes: tuple[tuple[int, int], ...]
    sample_ids: tuple[int, ...]
    image_ids: tuple[int, ...]
    targets: Targets
    replaced: int = 0

    def to(self, device: torch.device | str) -> Batch:
        return replace(self, images=to_device(self.images, device), targets=self.targets.to(device))

    def pin_memory(self) -> Batch:
        """As `Targets.pin_memory`."""
        return replace(self, images=self.images.pin_memory(), targets=self.targets.pin_memory())

    def record_stream(self, stream: torch.cuda.Stream) -> None:
        """As `Targets.record_stream`."""
        self.images.record_stream(stream)
        self.targets.record_stream(stream)

    def padding_mask(self) -> Tensor:
        """(B, H, W) bool on the images' device, True where a pixel is padding."""
        height, width = self.images.shape[-2:]
        device = self.images.device
        heights, widths = to_device(torch.tensor(self.sizes).view(-1, 2), device).unbind(1)
        below = torch.arange(height, device=device)[None, :, None] >= heights[:, None, None]
        right = torch.arange(width, device=device)[None, None, :] >= widths[:, None, None]
        return below | right


@dataclass(frozen=True)
class Detections:
    """What the detector found in one image, best first.

    scores: (N,) float32 in [0, 1]. labels: (N,) int64 contiguous class ids.
    boxes: (N, 4) float32, x1, y1, x2, y2 in pixels of the original image.
    """

    scores: Tensor
    labels: Tensor
    boxes: Tensor

    def to(self, device: torch.device | str) -> Detections:
        return Detections(self.scores.to(device), self.labels.to(device), self.boxes.to(device))


@dataclass(frozen=True)
class Category:
    """A class of a dataset: its raw id in annotation files and its name. Its contiguous id is its place in the list.

    An empty name marks a row of an imported class head that stands for no class; what it finds is never reported.
    """

    id: int
    name: str
