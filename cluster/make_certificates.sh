#!/usr/bin/env bash
# Certificates for Ray's TLS: of an authority of the cluster's own, made once, and of one node.
#
#     cluster/make_certificates.sh FOLDER NAME...
#
# A NAME is a host name or an IP address of the node: Ray's processes check it. FOLDER/ca.key stays with you. A node gets
# ca.crt, node.crt and node.key, and these variables:
#
#     RAY_USE_TLS=1 RAY_TLS_CA_CERT=ca.crt RAY_TLS_SERVER_CERT=node.crt RAY_TLS_SERVER_KEY=node.key
set -euo pipefail
umask 077

if [ $# -lt 2 ]; then
    echo "usage: make_certificates.sh FOLDER NAME..." >&2
    exit 2
fi
folder=$1
shift
mkdir -p "$folder"

names=""
for name in "$@"; do
    case $name in
        *[!0-9.]*) kind=DNS ;;
        *) kind=IP ;;
    esac
    if [[ $name == *:* ]]; then kind=IP; fi
    names="${names:+$names,}$kind:$name"
done

if [ ! -e "$folder/ca.key" ]; then
    openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 3650 -subj "/CN=aerial-seg authority" \
        -addext "basicConstraints=critical,CA:TRUE" -addext "keyUsage=critical,keyCertSign,cRLSign" \
        -keyout "$folder/ca.key" -out "$folder/ca.crt" 2> /dev/null
fi
openssl req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj "/CN=$1" \
    -keyout "$folder/node.key" -out "$folder/node.csr" 2> /dev/null
# Each process of Ray is a server to some and a client of others.
openssl x509 -req -days 365 -in "$folder/node.csr" -CA "$folder/ca.crt" -CAkey "$folder/ca.key" -CAcreateserial \
    -extfile <(echo "subjectAltName=$names"; echo "extendedKeyUsage=serverAuth,clientAuth") \
    -out "$folder/node.crt" 2> /dev/null
rm "$folder/node.csr"
echo "$folder/node.crt: for $*" >&2
