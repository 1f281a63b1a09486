"""The pairs of the density study, committed before its first run: FitGMM's default is chosen on one half and reported on the other.

A pair is a network's training data and the data that it has to tell from it. Both halves hold near and far data, both kinds of
brightness and every training set, so that no default rests on one of them. Digits pairs are two digits that the network never sees. ``brighter`` is
the test set times 3, ``darker`` the test set times 0.3. Of ``imbalanced`` training data, the classes 0 to 4 are cut to a fifth. Every
network is trained with and without spectral normalisation, but for those of the digits.
"""

CHOOSE = {
    "digits": ["0+6", "3+5", "8+9", "2+7"],
    "mnist": ["fashion", "notmnist", "brighter"],
    "fashion": ["kmnist", "omniglot", "darker"],
    "mnist imbalanced": ["fashion"],
    "cifar10": ["fashion", "mnist"],
}

REPORT = {
    "digits": ["1+4", "0+8", "5+9", "6+7"],
    "mnist": ["kmnist", "omniglot", "darker"],
    "fashion": ["mnist", "notmnist", "brighter"],
    "fashion imbalanced": ["mnist", "notmnist"],
    "cifar10": ["cifar100", "kmnist"],
}
