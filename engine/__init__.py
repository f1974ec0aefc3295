"""Fine-tuning of transformer models by one explicit loop. Start reading at engine/train.py."""

__version__ = "0.1.0"
