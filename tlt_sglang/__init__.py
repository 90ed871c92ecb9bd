"""TLT-SGLang: adaptive speculative decoding and an online-trained drafter on stock SGLang."""

__version__ = "0.1.0"
