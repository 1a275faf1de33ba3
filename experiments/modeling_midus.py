# SPDX-License-Identifier: MIT
"""
Models of transformers with the memory layers of MIDUS (Kim et al., arXiv 2512.13751) in between.

This file and hml.py travel with a model's weights, so that

    AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)

needs nothing else. config.json says what stands where: `new_layers` lists the memory layers by
their index in the stack, from 0, and `midus` has their sizes and their form. (They are nested there
because a `top_k` at the top would be read as a setting of generate.)

To add a family: import its class, add a class of two lines and its entry to the last section, and a
small config of it to FAMILIES in tests/test_hub.py. That test fills the bank and compares, since
with a bank of zeros the logits equal the base's whatever else is wrong. What a family needs: its
layers take hidden_states first and return a tensor, and have a norm before attention; attention
returns a tuple, takes its keyword arguments from the layer, has its place in the cache in
`layer_idx`, and ends in one output projection; heads times their width is hidden_size (true of
Qwen3 1.7B, not of 0.6B). If its parts have other names, add them to the tuples in `parts` and
`decoder_layers`, and to that in hub.py's `silence`.

Not here: the memory layers in `output_hidden_states` and `output_attentions`, and in gradient
checkpointing; transformers finds its own layers alone.

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

# from_pretrained imports the two files as a package; in the repository they are plain modules.
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
    """model.py's MemoryBlock, made of a decoder layer; (B, T, C) -> (B, T, C).

    layer: the decoder layer whose norm and attention this one takes over (not copies); its
    feed-forward part is left out. config.midus: the sizes of HeadwiseMemory, and

        query       what a head asks with: "head", its own output, and the output projection is
                    removed (as published); "token", its slice of x + attention
        residual    whether attention is added to x beside the memory; needs query "token"

    A bank of zeros adds zeros. So this layer starts as the identity; with residual it does if
    attention's output projection starts at zero as well, which hub.py sees to.
    """

    def __init__(self, layer: nn.Module, config):
        super().__init__()
        sizes = dict(config.midus)
        self.query = sizes.pop("query")
        self.residual = sizes.pop("residual", False)
        self.norm, self.attention, output = parts(layer)

        # With Identity for its output projection attention returns the heads' outputs side by side.
        if self.query == "head":
            setattr(self.attention, output, nn.Identity())
        n_head = config.num_attention_heads
        self.memory = HeadwiseMemory(n_head, config.hidden_size // n_head, **sizes)

    def forward(self, hidden_states: Tensor, *args, **kwargs) -> Tensor:
        """hidden_states (B, T, C) -> (B, T, C). All else goes to attention: mask, cache, ..."""
        attended = self.attention(self.norm(hidden_states), *args, **kwargs)[0]  # (B, T, C)
        asking = attended if self.query == "head" else hidden_states + attended
        heads = asking.unflatten(-1, (self.memory.n_head, -1))  # (B, T, H, d_h)
        stream = asking if self.residual else hidden_states
        return stream + self.memory(heads)


class WithMemory:
    """First among a class's bases: its layers in config.new_layers become memory layers.

    The family builds the whole deep stack, so that every layer knows its place in the cache.
    """

    def __init__(self, config):
        super().__init__(config)
        layers = decoder_layers(self)
        for i in config.new_layers:
            layers[i] = MemoryLayer(layers[i], config)

        # device_map must not split a memory layer over several devices.
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
