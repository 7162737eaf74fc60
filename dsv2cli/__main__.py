"""`python -m dsv2cli` is `dsv2`."""

from dsv2cli.cli.app import main

if __name__ == "__main__":
    main()
