"""A tokenizer of one's own: a vocabulary learnt from the recipe's training text.

A tokenizer cuts text into pieces that a model has vectors for. Which pieces there are is learnt from text, before any
weight is; each kind has its own rule for what is a good piece:

    byte_bpe    begin with 256 bytes; again and again join the pair that occurs most often          (GPT-2)
    wordpiece   begin with the characters; join likewise; inside a word a piece is written ##piece   (BERT)
    unigram     begin with very many pieces; drop those whose loss changes the text's likelihood
                p(text) = the product of its pieces' probabilities the least, until few are left     (T5)

    "lowest lower"   byte_bpe: low est Ġlow er      wordpiece: low ##est low ##er      unigram: ▁low est ▁low er

Then comes what the architecture wants around a text: [CLS] text [SEP] for an encoder, text </s> for an encoder-decoder,
<s> text for Llama and its kin, the bare text for GPT-2, whose only special token is <|endoftext|>.

The tokenizers library does the work, and the same texts give the same bytes. That takes care: its WordPiece and Unigram
trainers walk through hash maps in an order that changes from process to process. `_wordpiece` and `_unigram` say what
they do about it. What was trained is kept in the cache, found by the hash of texts and options, and in the run folder.

Sennrich et al. 2016, arXiv:1508.07909; Wu et al. 2016, arXiv:1609.08144; Kudo 2018, arXiv:1804.10959.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine import disk, distributed, vet
from engine.errors import InputError
from engine.find import locate
from engine.schema import NewTokenizer

VERSION = 1  # of what is trained: part of the hash
KEPT = "tokenizer.json"  # its name in a run folder
LONGEST_PIECE = 16  # characters; of unigram
Around = tuple[str, str]  # what stands around one text, and around a pair


@dataclass(frozen=True)
class Family:
    """The special tokens of a kind of architecture, by role, in the order of their ids."""

    tokens: dict[str, str]
    around: Around


ENCODER = Family(
    {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"},
    ("[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1"),
)
ENCODER_DECODER = Family({"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}, ("$A </s>", "$A </s> $B </s>"))
DECODER = Family(
    {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}, ("<s> $A", "<s> $A </s> $B")
)
GPT2 = Family(
    {"eos_token": "<|endoftext|>", "bos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}, ("$A", "$A <|endoftext|> $B")
)


def serve(
    given: Any,  # schema.Model.tokenizer: a folder's name, or the group {train}
    family: Family,
    segments: bool,  # whether the model tells the two texts of a pair apart by token types
    texts: Callable[[], list[str]],
    *,
    longest: int,
    cache: Path | None,
    where: str,
    folders: tuple[Path, ...] = (),
    kept: Path | None = None,
) -> tuple[Any, str | None]:
    """(the tokenizer, its JSON if it was trained for this run).

    A folder's is loaded. One to train comes from `kept` (tokenizer.json of the run that goes on), from the cache, or is
    trained now: by rank 0, and all ranks get its bytes.
    """
    if isinstance(given, str):
        return load(given, where, folders), None
    text = None
    if distributed.rank() == 0:
        text = kept.read_text("utf-8") if kept and kept.is_file() else _cached(given.train, family, segments, texts(), cache)
    text = distributed.from_first(text)
    return wrap(text, family, segments, longest), text


def load(folder: str, where: str, folders: tuple[Path, ...] = ()) -> Any:
    """The fast tokenizer of a folder, on its own or with a model. InputError if there is none."""
    import transformers

    path = locate(folder, folders)
    if path is None or not (path / "tokenizer.json").is_file():
        raise InputError(f"{where}: {folder} is no folder that holds a tokenizer.json")
    vet.tokenizer(path, where)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        made = transformers.AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the kinds that a damaged tokenizer raises are many
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"{where}: the tokenizer of {folder} cannot be loaded: {reason}") from error
    if not getattr(made, "is_fast", False):
        raise InputError(f"{where}: the tokenizer of {folder} is not a fast one")
    return made


def _cached(options: NewTokenizer, family: Family, segments: bool, texts: list[str], cache: Path | None) -> str:
    """The trained tokenizer's JSON, from `cache` if this was trained before. A damaged file there is trained anew."""
    import tokenizers

    digest = hashlib.sha256()
    settings = [VERSION, tokenizers.__version__, options.model_dump(), family.tokens, family.around, segments]
    digest.update(json.dumps(settings, sort_keys=True).encode())
    for text in texts:
        digest.update(json.dumps(text).encode())
    path = cache / "tokenizers" / f"{digest.hexdigest()[:40]}.json" if cache else None
    if path and path.is_file():
        first, _, rest = path.read_text("utf-8", "replace").partition("\n")
        if first == hashlib.sha256(rest.encode()).hexdigest():
            return rest
    made = str(train(options, family, texts, segments).to_str())
    if path:
        with disk.refusing(path, len(made)):
            disk.make(path.parent)
        disk.replace(path, f"{hashlib.sha256(made.encode()).hexdigest()}\n{made}".encode())
    return made


def wrap(text: str, family: Family, segments: bool, longest: int) -> Any:
    """The JSON of a trained tokenizer as transformers has it; `longest` is the number of tokens that the model can read."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    inputs = ["input_ids", "token_type_ids", "attention_mask"] if segments else ["input_ids", "attention_mask"]
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(text), model_max_length=longest, model_input_names=inputs, padding_side="right",
        clean_up_tokenization_spaces=False, **family.tokens,
    )  # fmt: skip


def train(options: NewTokenizer, family: Family, texts: list[str], segments: bool = False) -> Any:
    """A tokenizers.Tokenizer learnt from `texts`: a pure function of its arguments."""
    from tokenizers import processors

    special = list(dict.fromkeys(family.tokens.values()))
    made = {"wordpiece": _wordpiece, "byte_bpe": _byte_bpe, "unigram": _unigram}[options.kind](options, family, special, texts)
    made.add_special_tokens(special)
    single, pair = family.around
    ids = [(token, made.token_to_id(token)) for token in special]
    pair = pair if segments else pair.replace(":1", "")
    made.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=ids)
    return made


def _byte_bpe(options: NewTokenizer, family: Family, special: list[str], texts: list[str]) -> Any:
    """All 256 bytes are pieces, so no text is unknown."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    if options.lowercase:
        made.normalizer = normalizers.Lowercase()
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=options.vocabulary, min_frequency=options.min_frequency, special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False,
    )  # fmt: skip
    made.train_from_iterator(texts, trainer)
    return made


def _wordpiece(options: NewTokenizer, family: Family, special: list[str], texts: list[str]) -> Any:
    """BERT's: words at blanks and punctuation, each Chinese character a word of its own.

    The trainer numbers the pieces ##c as it meets them, in a hash map's order, and numbers decide between pairs that are
    equally frequent. So they are numbered here, before it begins: handed over as if they were special tokens. Which
    characters are left out, where there are too many, is decided here as well: the rarest.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    normalizer, cutter = normalizers.BertNormalizer(lowercase=options.lowercase), pre_tokenizers.BertPreTokenizer()
    words = Counter(word for text in texts for word, _ in cutter.pre_tokenize_str(normalizer.normalize_str(text)))
    inside = {c for word in words for c in word[1:]}
    room, kept = options.vocabulary - len(special), []
    for c, count in _by_frequency(words):
        takes = 2 if c in inside else 1
        if count < options.min_frequency or takes > room:
            break
        kept.append(c)
        room -= takes
    trained = Tokenizer(models.WordPiece(unk_token=family.tokens["unk_token"]))
    trained.normalizer, trained.pre_tokenizer = normalizer, cutter
    trainer = trainers.WordPieceTrainer(
        vocab_size=options.vocabulary, min_frequency=options.min_frequency, initial_alphabet=kept, limit_alphabet=len(kept),
        special_tokens=[*special, *("##" + c for c in sorted(inside & set(kept)))], show_progress=False,
    )  # fmt: skip
    trained.train_from_iterator(texts, trainer)
    made = Tokenizer(models.WordPiece(trained.get_vocab(), unk_token=family.tokens["unk_token"]))
    made.normalizer, made.pre_tokenizer, made.decoder = normalizer, cutter, decoders.WordPiece()
    return made


def _unigram(options: NewTokenizer, family: Family, special: list[str], texts: list[str]) -> Any:
    """T5's: blanks are written ▁, and a piece crosses neither one nor a punctuation mark.

    The trainer adds in a hash map's order, so scores differ in their last digits; they are rounded. Characters that no
    likely piece holds get scores just above the least, in that order too; they are dealt out again by code point.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    steps = [
        normalizers.NFKC(),
        *([normalizers.Lowercase()] if options.lowercase else []),
        normalizers.Replace(Regex("\\s+"), " "),
    ]
    normalizer = normalizers.Sequence(steps)
    cutter = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(), pre_tokenizers.Punctuation()])
    words = Counter(word for text in texts for word, _ in cutter.pre_tokenize_str(normalizer.normalize_str(text)))
    kept = {c for c, _ in _by_frequency(words)[: options.vocabulary // 2]}  # a character is always a piece
    trained = Tokenizer(models.Unigram())
    trained.normalizer, trained.pre_tokenizer = normalizer, cutter
    trainer = trainers.UnigramTrainer(
        vocab_size=options.vocabulary, special_tokens=special, unk_token=family.tokens["unk_token"], show_progress=False,
        max_piece_length=LONGEST_PIECE,
    )  # fmt: skip
    trained.train_from_iterator(
        ("".join(c if c in kept or c.isspace() else " " for c in normalizer.normalize_str(t)) for t in texts), trainer
    )
    scores = {piece: score for piece, score in json.loads(trained.to_str())["model"]["vocab"] if piece not in special}
    single = sorted(piece for piece in scores if len(piece) == 1)
    low = min(scores.values()) + 1e-4 * len(single)
    rare = [c for c in single if scores[c] <= low]
    scores |= zip(rare, sorted((scores[c] for c in rare), reverse=True), strict=True)
    vocabulary = sorted(((piece, round(score, 6)) for piece, score in scores.items()), key=lambda one: (-one[1], one[0]))
    made = Tokenizer(
        models.Unigram([*((token, 0.0) for token in special), *vocabulary], special.index(family.tokens["unk_token"]))
    )
    made.normalizer, made.pre_tokenizer, made.decoder = normalizer, cutter, decoders.Metaspace()
    return made


def _by_frequency(words: Counter[str]) -> list[tuple[str, int]]:
    """The characters of counted words, the most frequent first, equals by code point."""
    counts: Counter[str] = Counter()
    for word, n in words.items():
        for c in word:
            counts[c] += n
    return sorted(counts.items(), key=lambda one: (-one[1], one[0]))
