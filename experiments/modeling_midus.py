# SPDX-License-Identifier: MIT
"""
Models of transformers with the memory layers of MIDUS (Kim et al., arXiv 2512.13751) in between.

This file and hml.py travel with a model's weights, so that

    AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)

needs nothing else. config.json says what stands where: `new_layers` lists the memory layers by
their index in the stack, from 0, and `midus` has their sizes. (They are nested there because
transformers would take a `top_k` of its own for one of generate's settings.)

To add a family: import its class, add two lines to the last section, and compare the logits with
the base's (experiments/hub.py prints the difference). Its layers need a norm before attention, and
an attention with an output projection. If their parts have other names than Llama's, `parts` and
`decoder_layers` have to know them. Not here: hidden_states and attentions of the memory layers in
`output_hidden_states`, which transformers collects from the family's own layers alone.

Shape names: B batch, T tokens, C hidden_size, H heads, d_h = C / H.
"""

from torch import Tensor, nn
from transformers import (
    GPT2LMHeadModel,
    LlamaForCausalLM,
    MistralForCausalLM,
    OlmoForCausalLM,
    PreTrainedModel,
    Qwen2ForCausalLM,
)

# Beside the weights transformers makes a package of the two files; in the repository they are none.
try:
    from .hml import HeadwiseMemory
except ImportError:
    from hml import HeadwiseMemory


# ---- What the parts of a decoder layer are called ------------------------------------------------
def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The stack of decoder layers. Raises ValueError if there is none under a known name."""
    for name in ("layers", "h"):  # Llama's name, and GPT-2's
        if hasattr(model.base_model, name):
            return getattr(model.base_model, name)
    raise ValueError(f"{type(model).__name__} has no list of layers called layers or h")


def parts(layer: nn.Module) -> tuple[nn.Module, nn.Module, str]:
    """(norm before attention, attention, the name of its output projection) of a decoder layer.

    Raises ValueError if it has no such parts.
    """
    for norm, attention, output in (
        ("input_layernorm", "self_attn", "o_proj"),
        ("ln_1", "attn", "c_proj"),
    ):
        if hasattr(layer, norm) and hasattr(getattr(layer, attention, None), output):
            return getattr(layer, norm), getattr(layer, attention), output
    raise ValueError(
        f"{type(layer).__name__} has no norm before attention (input_layernorm, self_attn, o_proj; "
        "or ln_1, attn, c_proj), so nothing here knows what to copy"
    )


# ---- The memory layer ----------------------------------------------------------------------------
class MemoryLayer(nn.Module):
    """x + HML(query), where query comes from a decoder layer's norm and attention.

    layer: the decoder layer whose norm and attention this one takes over; its feed-forward part is
    left out. config.midus: the sizes of HeadwiseMemory, and query, "head" or "token":

        head    a head asks with its own output, before any output projection (as published)
        token   a head asks with its slice of x + attention, output projection included

    Nothing passes around the memory but x, so a bank of zeros makes this layer the identity.
    """

    def __init__(self, layer: nn.Module, config):
        super().__init__()
        sizes = dict(config.midus)
        self.query = sizes.pop("query")
        self.norm, self.attention, output = parts(layer)

        # Without its output projection attention returns the heads' outputs side by side.
        if self.query == "head":
            setattr(self.attention, output, nn.Identity())
        n_head = config.num_attention_heads
        self.memory = HeadwiseMemory(n_head, config.hidden_size // n_head, **sizes)

    def forward(self, hidden_states: Tensor, *args, **kwargs) -> Tensor:
        """hidden_states (B, T, C) -> (B, T, C). What else comes is attention's: mask, cache, ..."""
        attended = self.attention(self.norm(hidden_states), *args, **kwargs)[0]  # (B, T, C)
        if self.query == "token":
            attended = hidden_states + attended
        heads = attended.unflatten(-1, (self.memory.n_head, -1))  # (B, T, H, d_h)
        return hidden_states + self.memory(heads)


class WithMemory:
    """Put before a model's class: its layers listed in config.new_layers become memory layers."""

    def __init__(self, config):
        super().__init__(config)
        layers = decoder_layers(self)
        for i in config.new_layers:
            layers[i] = MemoryLayer(layers[i], config)

        # A layer and its residual stay on one device where a model is spread over several.
        self._no_split_modules.add("MemoryLayer")


# ---- The families --------------------------------------------------------------------------------
class MidusLlama(WithMemory, LlamaForCausalLM):
    pass


class MidusQwen2(WithMemory, Qwen2ForCausalLM):
    pass


class MidusMistral(WithMemory, MistralForCausalLM):
    pass


class MidusOlmo(WithMemory, OlmoForCausalLM):
    pass


class MidusGPT2(WithMemory, GPT2LMHeadModel):
    pass


# By the model_type in config.json.
FAMILIES = {
    "llama": MidusLlama,
    "qwen2": MidusQwen2,
    "mistral": MidusMistral,
    "olmo": MidusOlmo,
    "gpt2": MidusGPT2,
}
