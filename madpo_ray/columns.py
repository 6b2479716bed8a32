"""The name of every column that an artifact may hold, and of the splits."""

PAIR_ID = "pair_id"
GROUP = "group"
GROUP_HASH = "group_hash"  # a number that decides the fold
FOLD = "fold"  # whose reward model, of `reward.folds`, scored the pair
SPLIT = "split"

PROMPT = "prompt"
CHOSEN = "chosen"
REJECTED = "rejected"
TEXT_COLUMNS = (PROMPT, CHOSEN, REJECTED)

PROMPT_IDS = "prompt_ids"
CHOSEN_IDS = "chosen_ids"
REJECTED_IDS = "rejected_ids"
RESPONSE_IDS = (CHOSEN_IDS, REJECTED_IDS)
TOKEN_COLUMNS = (PROMPT_IDS, *RESPONSE_IDS)
# Their numbers of tokens: the order of pairs follows from them, without reading the tokens.
LENGTHS = {
    PROMPT_IDS: "prompt_length",
    CHOSEN_IDS: "chosen_length",
    REJECTED_IDS: "rejected_length",
}

REWARDS = ("chosen_reward", "rejected_reward")
MARGIN = "margin"
RAW_MARGIN = "raw_margin"  # before calibration, in the units of the rewards' source
MARGIN_STD = "margin_std"  # of the margins of several reward models, before calibration
REF_LOGPS = ("ref_chosen_logps", "ref_rejected_logps")
POLICY_LOGPS = ("policy_chosen_logps", "policy_rejected_logps")

# Only while pairs are read: where a row comes from, and why it was rejected.
FILE = "file"
FILE_NUMBER = "file_number"
ROW = "row"
PAIR = "pair"  # of several in a row
REASON = "reason"
REASON_KIND = "reason_kind"  # the reason without the row's own values
CONTENT_HASH = "content_hash"
SWAPPED_HASH = "swapped_hash"  # content_hash of the pair with chosen and rejected swapped
NUM_CUT = "num_cut"  # responses that were cut at max_length
PROMPT_REPEATS = "prompt_repeats"  # responses that began with the prompt

# Only while micro-batches are on their way to a rank.
MICRO_BATCH = (
    "number",
    "tokens",
    "lengths",
    "step",
    "pairs_in_step",
    "response_tokens_in_step",
    "is_last",
)

# Columns of the user's that are carried along must not have one of these names.
RESERVED = frozenset(
    {
        PAIR_ID,
        GROUP,
        GROUP_HASH,
        FOLD,
        SPLIT,
        *TEXT_COLUMNS,
        *TOKEN_COLUMNS,
        *LENGTHS.values(),
        *REWARDS,
        MARGIN,
        RAW_MARGIN,
        MARGIN_STD,
        *REF_LOGPS,
        *POLICY_LOGPS,
        FILE,
        FILE_NUMBER,
        ROW,
        PAIR,
        REASON,
        REASON_KIND,
        CONTENT_HASH,
        SWAPPED_HASH,
        NUM_CUT,
        PROMPT_REPEATS,
        *MICRO_BATCH,
    }
)

TRAIN = "train"
VALIDATION = "validation"
TEST = "test"
SPLITS = (TRAIN, VALIDATION, TEST)
