"""MobileOne for timm."""
