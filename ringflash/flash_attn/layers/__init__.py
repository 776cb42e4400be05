"""flash-attn's layers: the rotary embedding."""
