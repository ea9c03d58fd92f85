import sys

from segformer_pl.errors import INTERRUPTED

if __name__ == "__main__":
    try:
        from segformer_pl.cli import main
    except KeyboardInterrupt:  # during the imports
        sys.exit(INTERRUPTED)
    main()
