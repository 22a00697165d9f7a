"""What the paper prints: tables 1, 2 and 3, and the counts of parameters in its section 6.1.

Reference: GRAND (Chamberlain et al. 2021).
"""

MeanStd = tuple[float, float]  # of test accuracies, in percent

PLANETOID = ("Cora", "CiteSeer", "PubMed")
GRAND_MODELS = ("GRAND-l", "GRAND-nl", "GRAND-nl-rw")


def _read(table: str) -> dict[str, dict[str, MeanStd]]:
    """By data set and model; `-` where the paper has no number."""
    head, *lines = (line.split() for line in table.strip().splitlines())
    found: dict[str, dict[str, MeanStd]] = {dataset: {} for dataset in head}
    for model, *cells in lines:
        for dataset, cell in zip(head, cells, strict=True):
            if cell != "-":
                mean, std = cell.split("±")
                found[dataset][model] = float(mean), float(std)
    return found


# Table 1: published Planetoid splits, 20 initialisations.
TABLE1 = _read("""
             Cora      CiteSeer  PubMed
GCN          81.9±0.8  69.5±0.9  79.0±0.5
GAT          82.8±0.5  71.0±0.6  77.0±1.3
MoNet        82.2±0.7  70.0±0.6  77.7±0.6
GS-maxpool   77.4±1.0  67.0±1.0  76.6±0.8
Lanczos      79.5±1.8  66.2±1.9  78.3±0.3
AdaLanczos   80.4±1.1  68.7±1.0  78.1±0.4
CGNN         81.7±0.7  68.1±1.2  80.2±0.3
GDE          83.8±0.5  72.5±0.5  79.9±0.3
GODE         83.3±0.3  72.4±0.6  80.1±0.3
GRAND-l      84.7±0.6  73.3±0.4  80.4±0.4
GRAND-nl     83.6±0.5  70.8±1.1  79.7±0.3
GRAND-nl-rw  82.9±0.7  73.6±0.3  81.0±0.4
""")

# Table 2: 100 random splits, 20 initialisations; ogbn-arxiv on its own split, labels as input.
TABLE2 = _read("""
             Cora      CiteSeer  PubMed    CoauthorCS  Computers  Photo      ogbn-arxiv
GCN          81.5±1.3  71.9±1.9  77.8±2.9  91.1±0.5    82.6±2.4   91.2±1.2   72.17±0.33
GAT          81.8±1.3  71.4±1.9  78.7±2.3  90.5±0.6    78.0±19.0  85.7±20.3  73.65±0.11
GAT-ppr      81.6±0.3  68.5±0.2  76.7±0.3  91.3±0.1    85.4±0.3   90.9±0.3   -
MoNet        81.3±1.3  71.2±2.0  78.6±2.3  90.8±0.6    83.5±2.2   91.2±2.3   -
GS-mean      79.2±7.7  71.6±1.9  77.4±2.2  91.3±2.8    82.4±1.8   91.4±1.3   71.39±0.16
GS-maxpool   76.6±1.9  67.5±2.3  76.1±2.3  85.0±1.1    -          90.4±1.3   -
CGNN         81.4±1.6  66.9±1.8  66.6±4.4  92.3±0.2    80.29±2.0  91.39±1.5  58.7±2.5
GDE          78.7±2.2  71.8±1.1  73.9±3.7  91.6±0.1    82.9±0.6   92.4±2.0   56.66±10.9
GRAND-l      83.6±1.0  73.4±0.5  78.8±1.7  92.9±0.4    83.7±1.2   92.3±0.9   71.87±0.17
GRAND-nl     82.3±1.6  70.9±1.0  77.5±1.8  92.4±0.3    82.4±2.1   92.4±0.8   71.2±0.2
GRAND-nl-rw  83.3±1.3  74.1±1.7  78.1±2.1  91.3±0.7    85.8±1.5   92.5±1.0   72.23±0.2
""")

# Features and classes, of table 3.
FEATURES_CLASSES: dict[str, tuple[int, int]] = {
    "Cora": (1433, 7),
    "CiteSeer": (3703, 6),
    "PubMed": (500, 3),
    "CoauthorCS": (6805, 15),
    "Computers": (767, 10),
    "Photo": (745, 8),
    "ogbn-arxiv": (128, 40),
}

# Section 6.1 counts those of ogbn-arxiv, and no others.
ARXIV_PARAMETERS = {"GCN": 143_000, "GS-mean": 219_000, "GAT": 1_630_000, "GRAND": 70_000}
