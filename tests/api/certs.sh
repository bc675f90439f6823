#!/bin/sh
# certs.sh DIR: a CA, servers and clients of all sorts, and another CA, by openssl
set -e
cd "$1"
exec 2>openssl.log
ca() { # name
	openssl ecparam -name prime256v1 -genkey -noout -out $1.key
	openssl req -x509 -new -key $1.key -subj "/CN=$1" -days 10 -out $1.crt
}
key() { # name kind
	case $2 in
	ec) openssl ecparam -name prime256v1 -genkey -noout -out $1.key ;; # SEC1
	p384) openssl ecparam -name secp384r1 -genkey -noout -out $1.key ;;
	ec-pkcs8) openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out $1.key ;;
	rsa) openssl genrsa -traditional -out $1.key 2048 ;; # PKCS1
	rsa-pkcs8) openssl genpkey -algorithm RSA -pkeyopt rsa_keygen_bits:2048 -out $1.key ;;
	esac
}
sign() { # name ca days usage [SAN]
	openssl req -new -key $1.key -subj "/O=system:nodes/CN=$1" -out $1.csr
	printf '%s\n' "extendedKeyUsage=$4" ${5:+"subjectAltName=$5"} >$1.ext
	openssl x509 -req -in $1.csr -CA $2.crt -CAkey $2.key -CAcreateserial -days $3 -extfile $1.ext -out $1.crt
}
here=IP:127.0.0.1,IP:::1,DNS:localhost,DNS:kubernetes.default
ca cluster
ca other
for kind in ec p384 rsa; do
	key server-$kind $kind
	sign server-$kind cluster 10 serverAuth $here
done
key expired ec
sign expired cluster -1 serverAuth $here
key elsewhere ec
sign elsewhere cluster 10 serverAuth DNS:api.example,IP:192.0.2.1
key notserver ec
sign notserver cluster 10 clientAuth $here
for kind in ec ec-pkcs8 rsa rsa-pkcs8; do
	key client-$kind $kind
	sign client-$kind cluster 10 clientAuth
done
key stranger ec
sign stranger other 10 clientAuth
openssl ec -in client-ec.key -aes128 -passout pass:secret -out locked.key
