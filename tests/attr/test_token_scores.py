"""Token scores choose queries by the padding of each layer's own tokens."""

from __future__ import annotations

import torch
import transformers

from captum_cw import ContributionWeights, TokenScores
from support.inputs import token_ids


def test_an_encoder_and_a_decoder_of_one_length_choose_their_own_queries() -> None:
    sizes = {"layers": 1, "attention_heads": 4, "ffn_dim": 32}
    sides = {f"{side}_{n}": x for side in ("encoder", "decoder") for n, x in sizes.items()}
    torch.manual_seed(0)
    config = transformers.BartConfig(vocab_size=64, d_model=32, **sides)
    model = transformers.BartForConditionalGeneration(config).eval()
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[0, 4:] = 0  # the padding of the encoder alone
    ids, decoder_ids = token_ids(2, 7), token_ids(2, 7, seed=5)
    inputs = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": decoder_ids}
    both = TokenScores(ContributionWeights(model), layers=None, queries=-1).attribute(inputs)
    for n, side in enumerate((model.model.encoder, model.model.decoder)):
        method = ContributionWeights(model, [side.layers[0].self_attn])
        alone = TokenScores(method, layers=None, queries=-1).attribute(inputs)
        assert torch.allclose(both[:, n], alone[:, 0], atol=1e-6)
