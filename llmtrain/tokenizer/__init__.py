"""Text to numbers and back (config group `tokenizer`): trained on the data, or read from the files of others."""

from llmtrain.tokenizer.loaded import file, files_of
from llmtrain.tokenizer.tokenizer import END_OF_TEXT, Tokenizer
from llmtrain.tokenizer.trained import bpe, byte, char, unigram, wordpiece

__all__ = ["END_OF_TEXT", "Tokenizer", "bpe", "byte", "char", "file", "files_of", "unigram", "wordpiece"]
