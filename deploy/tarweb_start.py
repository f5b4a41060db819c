"""The `tarweb` command of an installed tarweb; `python3 -m tarweb_start` does the same.

The server's modules have short names, which others in site-packages may have as well. They are installed into a
folder of their own, tarweb_files, which goes to the front of the search path: `import tls` finds the server's.
"""

import sys

import tarweb_files


def main():
    """Run the server as the command line says; its exit status."""
    sys.path.insert(0, tarweb_files.__path__[0])
    import tarweb
    return tarweb.main()


if __name__ == "__main__":
    sys.exit(main())
