"""Post-training quantization of hybrid vision transformers, down to an integer model that really runs."""
