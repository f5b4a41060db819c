"""Certificates, made anew for every run: an authority, one below it, and what the lower one vouches for."""

import base64
import datetime
import functools
import hashlib
import ipaddress
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption, Encoding, NoEncryption, PrivateFormat, PublicFormat,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

KINDS = {
    "rsa": lambda: rsa.generate_private_key(65537, 2048),
    "p256": lambda: ec.generate_private_key(ec.SECP256R1()),
    "p384": lambda: ec.generate_private_key(ec.SECP384R1()),
    "ed25519": ed25519.Ed25519PrivateKey.generate,
}
DAY = datetime.timedelta(days=1)


@dataclass(frozen=True)
class Pair:
    """A certificate with its chain, and its key, in files; `root` is the file that a client needs to believe it."""

    cert: Path
    key: Path
    root: Path

    @property
    def flags(self):
        return "--tls-cert", str(self.cert), "--tls-key", str(self.key)

    @functools.cached_property
    def leaf(self):
        return x509.load_pem_x509_certificates(self.cert.read_bytes())[0]

    @property
    def der(self):
        return self.leaf.public_bytes(Encoding.DER)

    @property
    def spki(self):
        """The digest by which Chromium is told to trust this key."""
        info = self.leaf.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        return base64.b64encode(hashlib.sha256(info).digest()).decode()


def private_pem(key, password=None):
    how = BestAvailableEncryption(password) if password else NoEncryption()
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, how)


class Authority:
    """A root that clients trust, and an intermediate that issues: so a server has to send its chain to be believed."""

    def __init__(self, folder):
        self.folder = Path(folder)
        self.issued = 0
        self.root_key, self.lower_key = KINDS["p256"](), KINDS["p256"]()
        self.root_name, self.lower_name = subject("Test Root"), subject("Test Intermediate")
        root = sign(self.root_name, self.root_key.public_key(), self.root_name, self.root_key, authority())
        self.lower = sign(self.lower_name, self.lower_key.public_key(), self.root_name, self.root_key, authority())
        self.root = self.folder / "root.pem"
        self.root.write_bytes(root.public_bytes(Encoding.PEM))

    def issue(self, kind="p256", names=("localhost", "127.0.0.1"), valid=(-1, 30), key=None):
        """A Pair for these names; `valid` is from and to, in days from now."""
        key = key or KINDS[kind]()
        leaf = sign(subject(names[0] if names else "no names"), key.public_key(), self.lower_name, self.lower_key,
                    server(names), valid)
        self.issued += 1
        pair = Pair(self.folder / f"{kind}-{self.issued}.pem", self.folder / f"{kind}-{self.issued}.key", self.root)
        pair.cert.write_bytes(leaf.public_bytes(Encoding.PEM) + self.lower.public_bytes(Encoding.PEM))
        pair.key.write_bytes(private_pem(key))
        return pair


def subject(common_name):
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def authority():
    """The extensions of a certificate that may sign others: [(extension, critical)]."""
    usage = dict.fromkeys(("digital_signature", "content_commitment", "key_encipherment", "data_encipherment",
                           "key_agreement", "encipher_only", "decipher_only"), False)
    return [(x509.BasicConstraints(ca=True, path_length=None), True),
            (x509.KeyUsage(key_cert_sign=True, crl_sign=True, **usage), True)]


def server(names):
    """The extensions of a web server's certificate."""
    extensions = [(x509.BasicConstraints(ca=False, path_length=None), True),
                  (x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), False)]
    if names:
        extensions.append((x509.SubjectAlternativeName([general_name(name) for name in names]), False))
    return extensions


def general_name(name):
    if name[-1].isdigit():
        return x509.IPAddress(ipaddress.ip_address(name))
    return x509.DNSName(name)


def sign(name, public_key, issuer, issuer_key, extensions, valid=(-1, 30)):
    now = datetime.datetime.now(datetime.UTC)
    builder = (x509.CertificateBuilder().subject_name(name).issuer_name(issuer).public_key(public_key)
               .serial_number(x509.random_serial_number())
               .not_valid_before(now + valid[0] * DAY).not_valid_after(now + valid[1] * DAY)
               .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), False)
               .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), False))
    for extension, critical in extensions:
        builder = builder.add_extension(extension, critical)
    return builder.sign(issuer_key, SHA256())
