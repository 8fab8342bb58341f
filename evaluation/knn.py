"""k-nearest-neighbour classification by an encoder's features."""
import torch
import torch.nn.functional as F

from common.pgd import eval_mode
from evaluation.attacks import check_finite, in_order


@torch.no_grad()
def knn(encoder, train_images, test_images, k=200, temperature=0.1, present=None):
    """Weighted k-nearest-neighbour accuracy in per cent on un-augmented images (Wu et al. 2018, arXiv
    1805.01978): each of the k most similar training images votes for its class with weight exp(cosine /
    temperature). Temperature 0.1 as in MoCo's CIFAR-10 demo. `present`: the classes that test images can be
    of, whose labels are places in it; votes for others do not count. Raises ValueError where a feature is
    not finite."""
    with eval_mode(encoder):
        bank, labels = features(encoder, train_images, "training images")
        queries, wanted = features(encoder, test_images, "test images")
    right = 0
    for h, y in zip(queries.split(500), wanted.split(500)):
        similar, index = (h @ bank.T).topk(min(k, len(bank)), dim=1)
        votes = torch.zeros(len(h), train_images.classes, device=h.device)
        # Relative to the nearest one's, no vote is infinite.
        votes.scatter_add_(1, labels[index], ((similar - similar[:, :1]) / temperature).exp())
        if present:
            votes = votes[:, present]
        right += (votes.argmax(1) == y).sum()
    return 100 * int(right) / len(test_images)


def features(encoder, images, what):
    """The features of `images`, divided by their length, (N, dim), and the labels (N,)."""
    parts = []
    labels = []
    for x, y in in_order(images):
        parts.append(F.normalize(encoder(x).float()))
        labels.append(y)
    h = torch.cat(parts)
    check_finite(h, encoder, what)
    return h, torch.cat(labels)
