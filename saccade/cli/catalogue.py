"""What `--help` says of models, data sets, attacks, protocols and recipes.

One line for each name. The names are those of the registries, which need Keras;
this module needs nothing, so that `--help` is quick. `tests/test_help.py`
compares the two.
"""

MODELS = {
    "attention_mnist": "One affine view of a small image, chosen by a network.",
    "denoise": "ResNet-152 V2 with four denoising blocks.",
    "ecnn": "Crops of several sides around a gaze, a network for each.",
    "madry_cnn": "The MNIST network of Madry et al.",
    "multi_gaze": "Retinal views at learned gazes, a network for each.",
    "parallel_transformers": "Learned affine views, a network for each.",
    "preact_resnet18": "PreActResNet-18.",
    "resnet": "ResNet-18, optionally behind a retina or crops.",
    "resnet152": "ResNet-152 V2.",
    "resnet50": "ResNet-50 V2.",
    "resnet_cifar": "ResNet-20, optionally behind a retina or crops.",
    "resnet_se": "ResNet-152 V2 with squeeze-and-excitation.",
    "s3ta": "Sequential soft attention on the map of a vision network.",
    "wide_resnet": "WRN-28-10.",
}
DATA_SETS = {
    "cluttered_digits": "scikit-learn's digits among clutter, 40x40; embedded.",
    "mnist": "Handwritten digits, 28x28.",
    "usps": "Handwritten digits, 16x16, by default brought to 28x28.",
    "cluttered_mnist": "MNIST digits among clutter, 40x40.",
    "cifar10": "Ten classes of colour pictures, 32x32.",
    "imagenette": "Ten easy classes of ImageNet.",
    "imagenet10": "Ten classes of ImageNet.",
    "imagenet100": "A hundred classes of ImageNet.",
    "imagenet": "ImageNet, a thousand classes.",
    "bbox_imagenet10": "imagenet10, cropped to the largest bounding box.",
    "folder": "Any images, in train/<class>/ and val/<class>/.",
}
RECIPES = {
    "s3ta": "S3TA, targeted PGD-10.",
    "s3ta_16": "S3TA with the read-out curriculum of 16 steps.",
    "denoise": "Xie et al. 2019, targeted PGD-30.",
    "advex": "Kang et al. 2019, a radius of its own for each image.",
    "at_mnist": "Madry et al. 2018 on MNIST, radius 0.3.",
    "at_svhn": "Madry et al. 2018 on SVHN, radius 8/255.",
    "at_cifar10": "Madry et al. 2018 on CIFAR-10, radius 8/255.",
    "at_imagenet": "Madry et al. 2018 on ImageNet, radius 2/255.",
    "fast_cifar10": "Wong et al. 2020 on CIFAR-10, radius 8/255.",
}
OBJECTIVES = {
    "madry": "The loss on adversarial images.",
    "fast": "The same after one step of 1.25 epsilon from a random start.",
    "trades": "The clean loss and 6 times the divergence under attack.",
    "mart": "A boosted adversarial loss and 5 times a weighted divergence.",
    "alp": "Clean and adversarial loss, and the distance of their logits.",
    "llr": "The clean loss, its departure from linearity, and its slope.",
    "noise": "The loss on images with Gaussian noise.",
}
ATTACKS = {
    "fgsm": "One step of length epsilon (Goodfellow et al. 2015).",
    "pgd": "Projected gradient descent with restarts (Madry et al. 2018).",
    "bim": "Five steps from the image (Kurakin et al. 2017).",
    "mim": "Ten steps with momentum 1 (Dong et al. 2018).",
    "pgd_adam": "250 steps with Adam.",
    "spsa": "100 steps with estimated gradients (Uesato et al. 2018).",
    "square": "Random search, 5000 queries (Andriushchenko et al. 2020).",
    "apgd": "Auto-PGD on the cross-entropy (Croce and Hein 2020).",
    "apgd_t": "Auto-PGD on the targeted DLR loss of nine classes.",
    "fab": "FAB-T, the nearest boundary of nine classes.",
    "autoattack": "The ensemble of the last four (Croce and Hein 2020).",
}
PROTOCOLS = {
    "s3ta": "Random targets, PGD of 10 to 1000 steps.",
    "s3ta_strong": "Random targets, PGD of 5000 and 10,000 steps.",
    "s3ta_restarts": "Random targets, 1, 10 and 100 restarts.",
    "s3ta_adam": "Random targets, 250 steps of PGD with Adam.",
    "s3ta_spsa": "Random targets, SPSA.",
    "s3ta_untargeted": "Untargeted PGD of 200 steps at 4/255 and 16/255.",
    "handover": "Untargeted BIM of 5 steps, 20 above 64 pixels.",
    "perceptual": "PGD-10 at 4/255 and 8/255.",
    "autoattack": "AutoAttack, version standard.",
}
