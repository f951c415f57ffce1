"""How many tokens' logits exist at once."""

from jaxllm.config.loss_chunk import chunk_tokens


def test_chunks_are_alike_and_never_larger_than_asked():
    assert chunk_tokens(1000, 2048, 100) == 683
    assert chunk_tokens(2048, 2048, 100) is None
    assert chunk_tokens("none", 1 << 20, 1 << 20) is None


def test_auto_cuts_what_is_large():
    assert chunk_tokens("auto", 8192, 128256) == 1024
    assert chunk_tokens("auto", 2048, 4096) is None
    assert chunk_tokens("auto", 8192, 128256, hidden=4096, tpu=True) == 2048
    assert chunk_tokens("auto", 8192, 128256, hidden=8192, tpu=True) is None  # the head's gradient is as large as they
    assert chunk_tokens(512, 8192, 128256, hidden=8192, tpu=True) == 512
