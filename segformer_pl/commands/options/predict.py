"""Options of ``predict``."""

from jsonargparse import Namespace

from segformer_pl.commands.options.device import add_device_option
from segformer_pl.commands.options.parser import PROG, SegformerArgumentParser
from segformer_pl.commands.options.weights import add_network_option, add_state_option
from segformer_pl.data.image_suffixes import IMAGE_SUFFIXES
from segformer_pl.inference.protocol import Inference
from segformer_pl.video_file import VIDEO_SUFFIXES


def predict_parser() -> SegformerArgumentParser:
    """Return the parser of ``predict``."""
    parser = SegformerArgumentParser(
        prog=f"{PROG} predict",
        description="Segment images and videos with the network of a run, or with other weights; "
        "give exactly one of --ckpt and --weights. For every image, two files are written: "
        "masks/NAME.png holds the train id of every pixel at the image's own size, with the "
        "palette of the data set (with more than 256 classes: 16-bit grey, no palette); "
        "overlays/NAME.png shows the prediction over the image, small images enlarged. NAME is "
        "the image's path relative to the input folder, or to the part of the pattern before its "
        "first wildcard, without suffix; images that differ only in the suffix keep it "
        "(a.jpg.png). Images are rotated as their EXIF orientation says, transparency is ignored, "
        "16-bit images are reduced to their upper 8 bits, and of several frames the first is "
        "used. A video (extra `video`) gets a mask of every frame, masks/NAME/000000.png and so "
        "on, and overlays/NAME.mp4, which shows the prediction over the video at its own size, "
        "frame rate and times, without sound; overlays/NAME.png is its legend. Files that cannot "
        "be read or written are reported and skipped, and the exit status is 1. Existing files "
        "are overwritten. The evaluation protocol is that of the "
        "run's validation, or the size that preprocessor_config.json states, except for the "
        "--inference options that are given; the defaults listed for these options do not apply.",
    )
    parser.add_argument("--ckpt", help="checkpoint of a run of `fit`")
    parser.add_argument(
        "--weights",
        help="weights of a whole network in any layout that `convert` reads: a file, a folder, or "
        "a hub name owner/name@commit. Normalisation, class names, colours and size of the images "
        "are those that it states; otherwise ImageNet's, `class 0` and so on, distinct colours, "
        "and the image's own size",
    )
    add_state_option(parser)
    add_network_option(parser)
    parser.add_argument(
        "--input",
        required=True,
        help="images and videos to segment: one file; a folder, such as one of frames, searched "
        f"recursively for images ({', '.join(IMAGE_SUFFIXES)}) and videos "
        f"({', '.join(VIDEO_SUFFIXES)}); or a quoted pattern, such as 'photos/**/*.jpg'",
    )
    parser.add_argument("--output", required=True, help="folder that the files are written to")
    parser.add_argument(
        "--probabilities",
        action="store_true",
        help="also write probabilities/NAME.npz with the arrays `probabilities`, float16 of shape "
        "(classes, height, width), and `class_names`; memory grows with classes times pixels",
    )
    add_device_option(parser, "device of the network")
    # The checkpoint, which is read later, provides the defaults of these options.
    parser.add_class_arguments(Inference, "inference")
    return parser


def parse(arguments: list[str]) -> Namespace:
    """Parse the command-line arguments after ``predict``; ``inference`` holds the given options."""
    parser = predict_parser()
    options = parser.parse_args(arguments)
    given = parser.parse_args(arguments, defaults=False).get("inference")
    options["changes"] = given.as_dict() if given else {}
    return options
