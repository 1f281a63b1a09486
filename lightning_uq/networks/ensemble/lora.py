"""Members that are LoRA adapters of one model, as PEFT defines them."""

import copy
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_uq.errors import InputError, MissingExtraError, UnsupportedError
from lightning_uq.networks.ensemble.rows import MemberLayer, RowEnsembleNetwork
from lightning_uq.networks.labels import label
from lightning_uq.networks.output import Output


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise MissingExtraError(
            "LoRA members need PEFT, which is not installed: pip install 'lightning-uq[lora]'."
        ) from error
    return peft


class LoraLayer(MemberLayer):
    """A frozen linear layer with an adapter per member: y_m = layer(x_m) + s B_m A_m x_m, on rows [M B, ..., in] in the members' order.

    Args:
        layer: The layer: ``nn.Linear``, or the ``Conv1D`` of GPT-2.
        num_members: M.
        rank: r.
        scaling: s.
        dropout: Probability with which an input of the adapters is dropped.
        in_features: Size of the inputs.
        out_features: Size of the outputs.

    Attributes:
        lora_A: A [M, r, in], drawn by He's uniform initialization with a = sqrt(5), as in PEFT.
        lora_B: B [M, out, r], zeros at first.
    """

    def __init__(
        self,
        layer: nn.Module,
        num_members: int,
        *,
        rank: int,
        scaling: float,
        dropout: float,
        in_features: int,
        out_features: int,
    ) -> None:
        super().__init__(num_members)
        self.layer = layer
        self.scaling = scaling
        self.dropout = nn.Dropout(dropout)
        weight = layer.get_parameter("weight")
        self.lora_A = nn.Parameter(weight.new_empty(num_members, rank, in_features))
        self.lora_B = nn.Parameter(weight.new_zeros(num_members, out_features, rank))
        for own in self.lora_A:
            nn.init.kaiming_uniform_(own, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        """Outputs [M B, ..., out] of inputs [M B, ..., in]."""
        own: Tensor = self.layer(x)
        down, up = self.chosen(self.lora_A), self.chosen(self.lora_B)
        rows = self.dropout(x).reshape(len(down), -1, x.shape[-1])
        adapted = rows @ down.mT @ up.mT * self.scaling
        outputs: Tensor = own + adapted.reshape(own.shape)
        return outputs

    def plain(self, i: int) -> nn.Module:
        """The layer of member ``i``, with its adapter merged into the weight."""
        layer = copy.deepcopy(self.layer)
        change = self.scaling * (self.lora_B[i] @ self.lora_A[i]).detach()
        with torch.no_grad():  # Conv1D stores its weight transposed
            layer.get_parameter("weight").add_(change if isinstance(layer, nn.Linear) else change.T)
        return layer


class OwnLayers(MemberLayer):
    """A module of which each member has its own copy, such as the classifier in PEFT's ``modules_to_save``.

    Args:
        module: The module, which is copied.
        num_members: M.
    """

    def __init__(self, module: nn.Module, num_members: int) -> None:
        super().__init__(num_members)
        self.copies = nn.ModuleList(copy.deepcopy(module).requires_grad_(True) for _ in range(num_members))

    def forward(self, x: Tensor) -> Tensor:
        """Outputs [M B, ...] of inputs [M B, ...]."""
        copies = [self.copies[i] for i in (range(self.num_members) if self.members is None else self.members)]
        return torch.cat([one(rows) for one, rows in zip(copies, x.chunk(len(copies)), strict=True)])

    def plain(self, i: int) -> nn.Module:
        """A copy of member ``i``'s."""
        return copy.deepcopy(self.copies[i])


class LoraEnsembleNetwork(RowEnsembleNetwork):
    """M LoRA adapters of one model: the base is stored once, and one pass of M times the rows serves all members.

    Args:
        model: The model, for instance of Hugging Face. It is used as it is, and frozen; only the adapters and ``modules_to_save`` are trained.
        config: A ``peft.LoraConfig``.
        num_members: M.
        output: The kind of the model's output.

    Raises:
        MissingExtraError: PEFT is not installed.
        UnsupportedError: The configuration adapts other layers than linear ones, or asks for a variant of LoRA such as DoRA, or trains biases.

    Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022 (arXiv 2106.09685).

    Example:
        >>> from peft import LoraConfig
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> network = LoraEnsembleNetwork(model, LoraConfig(r=2, target_modules=["0"], modules_to_save=["2"]), num_members=5)
        >>> network(torch.zeros(2, 4)).shape
        torch.Size([5, 2, 3])
        >>> [name for name, p in network.named_parameters() if p.requires_grad][:2]
        ['shared.0.lora_A', 'shared.0.lora_B']
    """

    execution = "lora"

    def __init__(self, model: nn.Module, config: Any, num_members: int, *, output: Output = "logits") -> None:
        self._config = config
        adapted, saved = _places(model, config)
        model.requires_grad_(False)
        for name, options in adapted.items():
            _put(model, name, LoraLayer(model.get_submodule(name), num_members, **options))
        for name in saved:
            _put(model, name, OwnLayers(model.get_submodule(name), num_members))
        reason = f"{num_members} LoRA adapters of one model: one pass serves all members."
        super().__init__(model, num_members, output, reason)

    def save_adapters(self, folder: str | Path) -> list[Path]:
        """Write each member's adapter to ``folder/member_<i>`` in PEFT's own format, and return these folders.

        ``PeftModel.from_pretrained(base, path)`` reads one.
        """
        peft, paths = _peft(), []
        for i in range(self.num_indices):
            base = self._base()
            model = peft.get_peft_model(base, copy.deepcopy(self._config))
            peft.set_peft_model_state_dict(model, self._adapter(i))
            paths.append(Path(folder) / f"member_{i}")
            model.save_pretrained(paths[-1])
        return paths

    def load_adapters(self, folders: list[str | Path] | list[Path]) -> None:
        """Load the members' adapters from folders in PEFT's format, one per member.

        Raises:
            InputError: The number of folders is not M, or an adapter does not fit.
        """
        if len(folders) != self.num_indices:
            raise InputError(
                f"`folders` must name {self.num_indices} adapters, one per member, but it names {len(folders)}."
            )
        peft = _peft()
        for i, folder in enumerate(folders):
            state = peft.get_peft_model_state_dict(peft.PeftModel.from_pretrained(self._base(), folder))
            own = self._adapter(i)
            if state.keys() != own.keys() or any(state[name].shape != own[name].shape for name in own):
                raise InputError(
                    f"The adapter in {str(folder)!r} does not fit: it adapts other layers, or has another rank."
                )
            with torch.no_grad():
                for name, value in own.items():
                    value.copy_(state[name])

    def _base(self) -> nn.Module:
        """A copy of the model without adapters, whose own modules are member 0's."""
        return _without_adapters(copy.deepcopy(self.shared))

    def _adapter(self, i: int) -> dict[str, Tensor]:
        """Member ``i``'s values under PEFT's names, as views."""
        found: dict[str, Tensor] = {}
        for name, layer in self.shared.named_modules():
            if isinstance(layer, LoraLayer):
                found[f"base_model.model.{name}.lora_A.weight"] = layer.lora_A.detach()[i]
                found[f"base_model.model.{name}.lora_B.weight"] = layer.lora_B.detach()[i]
            elif isinstance(layer, OwnLayers):
                state = layer.copies[i].state_dict()
                found |= {f"base_model.model.{name}.{key}": value for key, value in state.items()}
        return found


def _places(model: nn.Module, config: Any) -> tuple[dict[str, Mapping[str, Any]], list[str]]:
    """The layers that PEFT would adapt, with the options of each, and the modules of which it would train a copy."""
    peft = _peft()
    if not isinstance(config, peft.LoraConfig):
        raise InputError(f"`sharing` must be 'batch_ensemble' or a peft.LoraConfig, but it is {config!r}.")
    for option in (
        "use_dora",
        "lora_bias",
        "layer_replication",
        "megatron_config",
        "trainable_token_indices",
    ):
        if getattr(config, option, None):
            raise UnsupportedError(f"LoRA members do not support `{option}` of the LoraConfig. Remove it.")
    if config.bias != "none":
        raise UnsupportedError(
            f"LoRA members do not train biases, but the LoraConfig has bias={config.bias!r}. Use 'none'."
        )
    if config.init_lora_weights is not True:
        raise UnsupportedError(
            f"LoRA members start as LoRA does by default, but the LoraConfig has init_lora_weights={config.init_lora_weights!r}."
        )
    made = peft.get_peft_model(copy.deepcopy(model), copy.deepcopy(config)).base_model.model
    adapted: dict[str, Mapping[str, Any]] = {}
    saved: list[str] = []
    for name, layer in made.named_modules():
        if isinstance(layer, peft.tuners.lora.LoraLayer):
            if not isinstance(layer, peft.tuners.lora.Linear):
                raise UnsupportedError(
                    f"LoRA members adapt linear layers only, but {label(name, layer)} is none. Change `target_modules`."
                )
            adapted[name] = {
                "rank": layer.r["default"],
                "scaling": layer.scaling["default"],
                "dropout": getattr(layer.lora_dropout["default"], "p", 0.0),
                "in_features": layer.in_features,
                "out_features": layer.out_features,
            }
        elif isinstance(layer, peft.utils.ModulesToSaveWrapper):
            saved.append(name)
    return adapted, saved


def _put(model: nn.Module, name: str, layer: nn.Module) -> None:
    owner, _, last = name.rpartition(".")
    setattr(model.get_submodule(owner), last, layer)


def _without_adapters(model: nn.Module) -> nn.Module:
    for name, layer in list(model.named_modules()):
        if isinstance(layer, LoraLayer):
            _put(model, name, layer.layer)
        elif isinstance(layer, OwnLayers):
            _put(model, name, layer.copies[0])
    return model
