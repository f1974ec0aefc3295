"""Speed, one small piece a file: each can be taken away, and a law in the tests says that it changes nothing."""

from engine import lean

lean.load()  # before anything here imports transformers
