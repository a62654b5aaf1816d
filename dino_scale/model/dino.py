"""The detector: DINO (arXiv 2203.03605), and by switches of its configuration the detectors it descends from."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dino_scale.config.schema import ModelConfig
from dino_scale.errors import ConfigError
from dino_scale.model import initialise
from dino_scale.model.backbone import Backbone
from dino_scale.model.decoder import Decoded, Decoder
from dino_scale.model.denoising import Denoiser, DenoisingQueries, Draws, visibility
from dino_scale.model.encoder import Encoder
from dino_scale.model.neck import Neck
from dino_scale.model.outputs import DenoisingOutputs, Outputs
from dino_scale.model.position import encode_image
from dino_scale.model.queries import LearnedQueries, Queries, SelectedQueries, all_rows
from dino_scale.model.tokens import Layout, flatten_maps, layout_of, level_masks
from dino_scale.structures import Targets


def build_model(config: ModelConfig, num_classes: int, *, pretrained: bool = True) -> Dino:
    """The detector with initial weights from torch's global generator, on the CPU.

    pretrained: load the file `config.backbone.weights` names, if any; False where all weights are loaded afterwards.
    Raises DataError for a file that does not fit, ConfigError for switches that exclude one another or a backbone that
    timm cannot build.
    """
    if num_classes < 1:
        raise ConfigError(f"the number of classes is {num_classes}: expected at least 1")
    if config.denoising.kind != "none" and config.query_form == "point":
        raise ConfigError(
            "model.query_form is 'point' but model.denoising.kind is "
            f"'{config.denoising.kind}': noised boxes need query_form 'anchor', points need denoising.kind 'none'"
        )
    return Dino(config, num_classes, pretrained)


class Dino(nn.Module):
    """Backbone, neck, deformable encoder, query selection, denoising and decoder."""

    def __init__(self, config: ModelConfig, num_classes: int, pretrained: bool) -> None:
        super().__init__()
        self.config = config
        self.num_classes = num_classes
        self.backbone = Backbone(config.backbone, pretrained)
        self.neck = Neck(self.backbone.channels, config.hidden, config.levels)
        self.level_embedding = nn.Embedding(config.levels, config.hidden)
        self.encoder = Encoder(config)
        self.queries: LearnedQueries | SelectedQueries
        if config.query_selection == "none":
            self.queries = LearnedQueries(config)
        else:
            self.queries = SelectedQueries(config, num_classes)
        self.decoder = Decoder(config, num_classes)
        self.denoiser: Denoiser | None = None
        if config.denoising.kind != "none":
            self.denoiser = Denoiser(config.denoising, num_classes, config.hidden)
        self._initialise()

    def forward(
        self,
        images: Tensor,
        padding_mask: Tensor,
        targets: Targets | None = None,
        generator: torch.Generator | None = None,
        draws: Draws | None = None,
    ) -> Outputs:
        """Predictions for a batch.

        images: (B, 3, H, W) float, normalised, padding 0. padding_mask: (B, H, W) bool, True on padding.
        targets, generator: in training with denoising, the boxes to noise and the source of the noise (on the CPU).
        draws: recorded noise in place of the generator's.
        """
        memory, layout = self.encode(images, padding_mask)
        queries = self.queries(memory, layout)
        noised = None
        if self.training and self.denoiser is not None:
            if targets is None:
                raise ValueError("training with denoising needs targets: pass targets=, or call eval() for inference")
            noised = self.denoiser(targets, generator, draws)
        return _outputs(self.decode(queries, noised, memory, layout), queries, noised)

    def encode(self, images: Tensor, padding_mask: Tensor) -> tuple[Tensor, Layout]:
        """Images to the encoder's memory (B, S, C)."""
        maps = self.neck(self.backbone(images))
        masks = level_masks(padding_mask, maps)
        layout = layout_of(masks)
        tokens = flatten_maps(maps)
        position = self.encode_positions(masks).to(tokens.dtype)
        return self.encoder(tokens, position, layout), layout

    def encode_positions(self, masks: list[Tensor]) -> Tensor:
        """Place and level of every token: (B, S, C) float32."""
        channels, temperature = self.config.hidden, self.config.position_temperature
        places = [
            encode_image(mask, channels, temperature) + embedding
            for mask, embedding in zip(masks, all_rows(self.level_embedding), strict=True)
        ]
        return torch.cat(places, dim=1)

    def decode(self, queries: Queries, noised: DenoisingQueries | None, memory: Tensor, layout: Layout) -> Decoded:
        """All queries through the decoder, denoising queries (if any) before the matching ones."""
        content, reference, allowed = queries.content, queries.reference, None
        if noised is not None:
            size = noised.content.shape[1]
            allowed = visibility(noised.groups, size, content.shape[1], content.device)
            content = torch.cat([noised.content.to(content.dtype), content], dim=1)
            reference = torch.cat([noised.reference, reference], dim=1)
        return self.decoder(content, reference, queries.position, memory, layout, allowed)

    def class_tensors(self) -> frozenset[str]:
        """Names of the parameters whose first dimension counts classes (the label embedding has one spare row)."""
        heads = ("decoder.class_head.", "queries.class_head.", "denoiser.label_embedding.")
        return frozenset(name for name, _ in self.named_parameters() if name.startswith(heads))

    def _initialise(self) -> None:
        initialise.initialise_convolutions(self.neck)
        for part in (self.encoder, self.decoder):
            initialise.xavier_matrices(part)
            initialise.initialise_attention(part)
        nn.init.normal_(self.level_embedding.weight)
        initialise.initialise_heads(self.decoder.class_head, self.decoder.box_head)
        if isinstance(self.queries, SelectedQueries):
            initialise.xavier_matrices(self.queries)
            self.queries.class_head.load_state_dict(self.decoder.class_head.state_dict())
            self.queries.box_head.load_state_dict(self.decoder.box_head.state_dict())
        else:
            initialise.initialise_learned(self.queries)


def _outputs(decoded: Decoded, queries: Queries, noised: DenoisingQueries | None) -> Outputs:
    """Splits the denoising queries off."""
    size = 0 if noised is None else noised.content.shape[1]
    denoising = None
    if noised is not None:
        denoising = DenoisingOutputs(
            decoded.logits[:, :, :size], decoded.boxes[:, :, :size], noised.positives, noised.groups
        )
    return Outputs(
        decoded.logits[:, :, size:],
        decoded.boxes[:, :, size:],
        queries.encoder_logits,
        queries.encoder_boxes,
        denoising,
    )
