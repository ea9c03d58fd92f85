import sys

if __name__ == "__main__":
    try:
        from segformer_pl.cli import main
    except KeyboardInterrupt:  # during the imports, which take seconds
        sys.exit(130)
    main()
