"""Programs written for SAGE in 2025: their import paths, and features without another name."""
