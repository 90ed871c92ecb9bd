"""The conversion of GGUF files: the order of rows, and tensors that do not belong to a Llama."""

from __future__ import annotations

import numpy as np
import pytest

from tlt_sglang.errors import EnvironmentProblem
from tlt_sglang.models import gguf_conversion


@pytest.mark.parametrize(("heads", "head_dim", "hidden"), [(9, 64, 576), (3, 64, 576), (1, 2, 5)])
def test_unpermute_is_the_inverse_of_llama_cpp(heads: int, head_dim: int, hidden: int) -> None:
    rows = heads * head_dim
    weight = np.random.default_rng(0).standard_normal((rows, hidden)).astype(np.float32)
    # As convert_hf_to_gguf.py does it.
    permuted = weight.reshape(heads, 2, head_dim // 2, hidden).swapaxes(1, 2).reshape(rows, hidden)
    np.testing.assert_array_equal(gguf_conversion.unpermute(permuted, heads), weight)


def test_missing_and_unknown_tensors_are_refused() -> None:
    class Tensor:
        name = "blk.7.attn_q.bias"

    config = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    with pytest.raises(EnvironmentProblem, match=r"blk\.7\.attn_q\.bias"):
        dict(gguf_conversion._weights([Tensor()], config))
    with pytest.raises(EnvironmentProblem, match=r"lacks the tensors .*output_norm\.weight"):
        dict(gguf_conversion._weights([], config))
