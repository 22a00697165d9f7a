"""What the paper prints: tables 1, 2 and 3, and the counts of parameters in its section 6.1.

Reference: GRAND (Chamberlain et al. 2021).
"""

MeanStd = tuple[float, float]  # of test accuracies, in percent

PLANETOID = ("Cora", "CiteSeer", "PubMed")
GRAND_MODELS = ("GRAND-l", "GRAND-nl", "GRAND-nl-rw")

# Table 1: published Planetoid splits, 20 initialisations.
TABLE1: dict[str, dict[str, MeanStd]] = {
    "Cora": {
        "GCN": (81.9, 0.8),
        "GAT": (82.8, 0.5),
        "MoNet": (82.2, 0.7),
        "GS-maxpool": (77.4, 1.0),
        "Lanczos": (79.5, 1.8),
        "AdaLanczos": (80.4, 1.1),
        "CGNN": (81.7, 0.7),
        "GDE": (83.8, 0.5),
        "GODE": (83.3, 0.3),
        "GRAND-l": (84.7, 0.6),
        "GRAND-nl": (83.6, 0.5),
        "GRAND-nl-rw": (82.9, 0.7),
    },
    "CiteSeer": {
        "GCN": (69.5, 0.9),
        "GAT": (71.0, 0.6),
        "MoNet": (70.0, 0.6),
        "GS-maxpool": (67.0, 1.0),
        "Lanczos": (66.2, 1.9),
        "AdaLanczos": (68.7, 1.0),
        "CGNN": (68.1, 1.2),
        "GDE": (72.5, 0.5),
        "GODE": (72.4, 0.6),
        "GRAND-l": (73.3, 0.4),
        "GRAND-nl": (70.8, 1.1),
        "GRAND-nl-rw": (73.6, 0.3),
    },
    "PubMed": {
        "GCN": (79.0, 0.5),
        "GAT": (77.0, 1.3),
        "MoNet": (77.7, 0.6),
        "GS-maxpool": (76.6, 0.8),
        "Lanczos": (78.3, 0.3),
        "AdaLanczos": (78.1, 0.4),
        "CGNN": (80.2, 0.3),
        "GDE": (79.9, 0.3),
        "GODE": (80.1, 0.3),
        "GRAND-l": (80.4, 0.4),
        "GRAND-nl": (79.7, 0.3),
        "GRAND-nl-rw": (81.0, 0.4),
    },
}

# Table 2: 100 random splits, 20 initialisations; ogbn-arxiv on its own split, labels as input.
TABLE2: dict[str, dict[str, MeanStd]] = {
    "Cora": {
        "GCN": (81.5, 1.3),
        "GAT": (81.8, 1.3),
        "GAT-ppr": (81.6, 0.3),
        "MoNet": (81.3, 1.3),
        "GS-mean": (79.2, 7.7),
        "GS-maxpool": (76.6, 1.9),
        "CGNN": (81.4, 1.6),
        "GDE": (78.7, 2.2),
        "GRAND-l": (83.6, 1.0),
        "GRAND-nl": (82.3, 1.6),
        "GRAND-nl-rw": (83.3, 1.3),
    },
    "CiteSeer": {
        "GCN": (71.9, 1.9),
        "GAT": (71.4, 1.9),
        "GAT-ppr": (68.5, 0.2),
        "MoNet": (71.2, 2.0),
        "GS-mean": (71.6, 1.9),
        "GS-maxpool": (67.5, 2.3),
        "CGNN": (66.9, 1.8),
        "GDE": (71.8, 1.1),
        "GRAND-l": (73.4, 0.5),
        "GRAND-nl": (70.9, 1.0),
        "GRAND-nl-rw": (74.1, 1.7),
    },
    "PubMed": {
        "GCN": (77.8, 2.9),
        "GAT": (78.7, 2.3),
        "GAT-ppr": (76.7, 0.3),
        "MoNet": (78.6, 2.3),
        "GS-mean": (77.4, 2.2),
        "GS-maxpool": (76.1, 2.3),
        "CGNN": (66.6, 4.4),
        "GDE": (73.9, 3.7),
        "GRAND-l": (78.8, 1.7),
        "GRAND-nl": (77.5, 1.8),
        "GRAND-nl-rw": (78.1, 2.1),
    },
    "CoauthorCS": {
        "GCN": (91.1, 0.5),
        "GAT": (90.5, 0.6),
        "GAT-ppr": (91.3, 0.1),
        "MoNet": (90.8, 0.6),
        "GS-mean": (91.3, 2.8),
        "GS-maxpool": (85.0, 1.1),
        "CGNN": (92.3, 0.2),
        "GDE": (91.6, 0.1),
        "GRAND-l": (92.9, 0.4),
        "GRAND-nl": (92.4, 0.3),
        "GRAND-nl-rw": (91.3, 0.7),
    },
    "Computers": {
        "GCN": (82.6, 2.4),
        "GAT": (78.0, 19.0),
        "GAT-ppr": (85.4, 0.3),
        "MoNet": (83.5, 2.2),
        "GS-mean": (82.4, 1.8),
        "CGNN": (80.29, 2.0),
        "GDE": (82.9, 0.6),
        "GRAND-l": (83.7, 1.2),
        "GRAND-nl": (82.4, 2.1),
        "GRAND-nl-rw": (85.8, 1.5),
    },
    "Photo": {
        "GCN": (91.2, 1.2),
        "GAT": (85.7, 20.3),
        "GAT-ppr": (90.9, 0.3),
        "MoNet": (91.2, 2.3),
        "GS-mean": (91.4, 1.3),
        "GS-maxpool": (90.4, 1.3),
        "CGNN": (91.39, 1.5),
        "GDE": (92.4, 2.0),
        "GRAND-l": (92.3, 0.9),
        "GRAND-nl": (92.4, 0.8),
        "GRAND-nl-rw": (92.5, 1.0),
    },
    "ogbn-arxiv": {
        "GCN": (72.17, 0.33),
        "GAT": (73.65, 0.11),
        "GS-mean": (71.39, 0.16),
        "CGNN": (58.70, 2.5),
        "GDE": (56.66, 10.9),
        "GRAND-l": (71.87, 0.17),
        "GRAND-nl": (71.2, 0.2),
        "GRAND-nl-rw": (72.23, 0.20),
    },
}

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
