"""What tests share: servers, tiny models, drafters fitted to a text, publishers of versions."""
