"""Models that nobody here wrote, each with what its own code says about it: its weights, its output units, its dropout.

Each model is tiny, built from a configuration, and trained on random numbers. Nothing is downloaded.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import lightning.pytorch
import peft
import pytorch_lightning
import torch
import transformers
from lightning.pytorch import LightningModule
from lightning.pytorch.demos import boring_classes, transformer
from pytorch_lightning.demos import lstm
from timm.models.convnext import ConvNeXt
from timm.models.resnet import BasicBlock, ResNet
from timm.models.swin_transformer_v2 import SwinTransformerV2
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss, nll_loss

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType

BATCH = 8
"""The number of samples in each batch."""

VOCABULARY, LENGTH, CLASSES = 40, 6, 10


@dataclass(frozen=True)
class Model:
    """A model of another library.

    Args:
        build: Returns a new LightningModule.
        batch: Returns a batch of random data.
        weights: A pattern of the names of its weights that are trained: of matrices and filters, not of biases, normalization,
            positions, tokens, and scales. Written by hand from the code of the model.
        hidden: Globs of modules inside it that return one float tensor, or are recurrent.
        inner: Patterns of all modules inside it that return one float tensor: ``"*"`` wherever that is true.
        columns: A pattern of the names of those weights that have shape (in, out), so that their columns are output units.
        embeddings: A pattern of the names of those weights that are embeddings.
        attributes: Classes that keep a dropout rate in an attribute of their own, with the attribute.
        drops: Whether it has any dropout.
        pruning: How far it can be pruned: with a threshold over all weights, or in each layer by itself.
        lightning: The package of Lightning that trains it.
    """

    build: Callable[[], Any]
    batch: Callable[[], Any]
    weights: str
    hidden: list[str]
    inner: list[str] = field(default_factory=lambda: ["*"])
    columns: str = ""
    embeddings: str = ""
    attributes: dict[str, str] = field(default_factory=dict)
    drops: bool = True
    pruning: str = "global"
    lightning: ModuleType = lightning.pytorch

    def matching(self, pattern: str, module: nn.Module) -> tuple[str, ...]:
        """Return the names of trained parameters that match a pattern."""
        return tuple(n for n, p in module.named_parameters() if p.requires_grad and re.fullmatch(pattern, n))


def plain(module: Any) -> nn.Module:
    """Return the network of the library inside a LightningModule, or the module if it is the network."""
    return getattr(module, "model", module)


class Images(LightningModule):
    """Classifies images."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        return cross_entropy(self.model(images), labels)

    def predict_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return self.model(batch[0])


class Tokens(LightningModule):
    """Trains a language model that computes its own loss."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.model(input_ids=batch, labels=batch).loss

    def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.model(input_ids=batch).logits


class Translates(transformer.LightningTransformer):
    """Lightning's demo of a transformer, without its download."""

    def __init__(self) -> None:
        super().__init__(vocab_size=1)
        self.model = transformer.Transformer(VOCABULARY, ninp=16, nhead=2, nhid=32, nlayers=1, dropout=0.2)

    def prepare_data(self) -> None:
        """Download nothing."""

    def predict_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return self(*batch)


class Boring(boring_classes.BoringModel):
    """Lightning's demo of a linear layer."""


class Writes(lstm.LightningLSTM):
    """The demo of an LSTM in ``pytorch_lightning``, without its download."""

    def __init__(self) -> None:
        super().__init__(vocab_size=1)
        self.model = lstm.SimpleLSTM(VOCABULARY, ninp=16, nhid=16, nlayers=2, dropout=0.2)

    def prepare_data(self) -> None:
        """Download nothing."""

    def predict_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return self.model(batch[0], self.model.init_hidden(BATCH))[0]


class Forecasts(pytorch_lightning.LightningModule):
    """Forecasts the next value of a series with an LSTM, as the forecasting libraries do."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.ModuleDict(
            {"lstm": nn.LSTM(1, 16, num_layers=2, dropout=0.2, batch_first=True), "head": nn.Linear(16, 1)}
        )

    def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.model["head"](self.model["lstm"](batch[:, :-1])[0])

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return mse_loss(self.predict_step(batch, batch_idx), batch[:, 1:])


class Written(Images):
    """Trains Lightning's demo of a network for MNIST, which returns logarithms of probabilities."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        return nll_loss(self.model(images), labels)


def images() -> tuple[Tensor, Tensor]:
    return torch.randn(BATCH, 3, 32, 32), torch.randint(CLASSES, (BATCH,))


def digits() -> tuple[Tensor, Tensor]:
    return torch.randn(BATCH, 1, 28, 28), torch.randint(CLASSES, (BATCH,))


def tokens() -> Tensor:
    return torch.randint(1, VOCABULARY, (BATCH, LENGTH))


def pairs() -> tuple[Tensor, Tensor]:
    return tokens(), tokens()


def vit() -> nn.Module:
    rates = {"pos_drop_rate": 0.1, "attn_drop_rate": 0.1, "proj_drop_rate": 0.1, "drop_path_rate": 0.2}
    return VisionTransformer(
        img_size=32, patch_size=8, num_classes=CLASSES, embed_dim=32, depth=2, num_heads=2, init_values=0.1, **rates
    )


def convnext() -> nn.Module:
    return ConvNeXt(num_classes=CLASSES, depths=(1, 2, 1, 1), dims=(8, 16, 16, 16), drop_rate=0.1, drop_path_rate=0.3)


def swin() -> nn.Module:
    return SwinTransformerV2(
        img_size=32, num_classes=CLASSES, embed_dim=16, depths=(2, 2), num_heads=(2, 2), window_size=4, drop_rate=0.1,
        proj_drop_rate=0.1, attn_drop_rate=0.1, drop_path_rate=0.2,
    )  # fmt: skip


def resnet() -> nn.Module:
    return ResNet(BasicBlock, (1, 1, 1, 1), num_classes=CLASSES, channels=(8, 16, 16, 16), stem_width=8, drop_rate=0.2)


def gpt2() -> nn.Module:
    rates = {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1}
    size = {"vocab_size": VOCABULARY, "n_positions": LENGTH, "n_embd": 16, "n_layer": 2, "n_head": 2}
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**size, **rates, **ends))


def bert() -> nn.Module:
    size = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.BertConfig(**size, intermediate_size=32, max_position_embeddings=LENGTH)
    return transformers.BertForMaskedLM(config)


def llama() -> nn.Module:
    size = {"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**size, **heads, attention_dropout=0.1))


def lora() -> nn.Module:
    config = peft.LoraConfig(r=4, lora_dropout=0.1, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)
    return peft.get_peft_model(gpt2(), config)


MODELS = {
    "timm ViT": Model(
        build=lambda: Images(vit()),
        batch=images,
        weights=r"model\.(patch_embed\.proj|blocks\.\d\.(attn\.(qkv|proj)|mlp\.fc[12])|head)\.weight",
        hidden=["model.blocks.*.mlp.act"],
    ),
    "timm ConvNeXt": Model(
        build=lambda: Images(convnext()),
        batch=images,
        weights=r"model\.(stem\.0|stages\.\d\.(downsample\.1|blocks\.\d\.(conv_dw|mlp\.fc[12]))|head\.fc)\.weight",
        hidden=["model.stages.*.mlp.act"],
    ),
    "timm SwinV2": Model(
        build=lambda: Images(swin()),
        batch=images,
        # without cpb_mlp, the position bias, which no_weight_decay() names
        weights=r"model\.(patch_embed\.proj|layers\.\d\.(blocks\.\d\.(attn\.(qkv|proj)|mlp\.fc[12])"
        r"|downsample\.reduction)|head\.fc)\.weight",
        hidden=["model.layers.*.mlp.act"],
    ),
    "timm ResNet": Model(
        build=lambda: Images(resnet()),
        batch=images,
        weights=r"model\.(conv1|layer\d\.\d\.(conv[12]|downsample\.0)|fc)\.weight",
        hidden=["model.layer*.conv1"],
        attributes={"ResNet": "drop_rate"},
    ),
    "transformers GPT-2": Model(
        build=lambda: Tokens(gpt2()),
        batch=tokens,
        weights=r"model\.transformer\.(wte|wpe|h\.\d\.(attn|mlp)\.c_(attn|fc|proj))\.weight",
        hidden=["model.transformer.h.*.mlp.act"],
        columns=r"model\.transformer\.h\.\d\..*",
        embeddings=r"model\.transformer\.w[tp]e\.weight",
    ),
    "transformers BERT": Model(
        build=lambda: Tokens(bert()),
        batch=tokens,
        weights=r"model\.(bert\.(embeddings\.\w+_embeddings|encoder\.layer\.\d\..*(query|key|value|dense))"
        r"|cls\.predictions\.transform\.dense)\.weight",
        hidden=["model.bert.encoder.layer.*.intermediate.intermediate_act_fn"],
        embeddings=r"model\.bert\.embeddings\..*",
    ),
    "transformers Llama": Model(
        build=lambda: Tokens(llama()),
        batch=tokens,
        weights=r"model\.(model\.(embed_tokens|layers\.\d\.(self_attn|mlp)\.\w+_proj)|lm_head)\.weight",
        hidden=["model.model.layers.*.mlp.act_fn"],
        inner=["*", "!model.model.rotary_emb"],  # it returns a tuple
        embeddings=r"model\.model\.embed_tokens\.weight",
        attributes={"LlamaAttention": "attention_dropout"},
    ),
    "peft LoRA": Model(
        build=lambda: Tokens(lora()),
        batch=tokens,
        weights=r".*\.lora_[AB]\.default\.weight",
        hidden=["model.base_model.model.transformer.h.*.mlp.act"],
        pruning="layer",  # B starts at zero, so at first its entries are the smallest of all
    ),
    "lightning Transformer": Model(
        build=Translates,
        batch=pairs,
        weights=r"model\.(embedding\.weight|transformer\.\w+\.layers\.\d\.((self_attn|multihead_attn)\."
        r"(in_proj_weight|out_proj\.weight)|linear[12]\.weight)|decoder\.weight)",
        hidden=["model.transformer.*.linear1"],
        embeddings=r"model\.embedding\.weight",
    ),
    "lightning MNIST": Model(
        build=lambda: Written(boring_classes.Net()),
        batch=digits,
        weights=r"model\.(conv|fc)[12]\.weight",
        hidden=["model.conv1", "model.fc1"],
    ),
    "lightning Boring": Model(
        build=Boring,
        batch=lambda: torch.randn(BATCH, 32),
        weights=r"layer\.weight",
        hidden=["layer"],
        inner=["layer"],  # its only one
        drops=False,
    ),
    "pytorch-lightning LSTM": Model(
        build=Writes,
        batch=pairs,
        weights=r"model\.(encoder\.weight|rnn\.weight_[ih]h_l[01]|decoder\.weight)",
        hidden=["model.encoder"],
        embeddings=r"model\.encoder\.weight",
        lightning=pytorch_lightning,
    ),
    "pytorch-lightning forecaster": Model(
        build=Forecasts,
        batch=lambda: torch.randn(BATCH, LENGTH, 1).cumsum(1),
        weights=r"model\.(lstm\.weight_[ih]h_l[01]|head\.weight)",
        hidden=["model.lstm"],
        lightning=pytorch_lightning,
    ),
}
