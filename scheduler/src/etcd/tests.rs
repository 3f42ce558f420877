//! The client over a real etcd with TLS.

use std::{fs, path::Path};

use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair, SanType};

use super::*;
use crate::etcd_process::EtcdProcess;

/// An etcd that asks for certificates talks to who has one of its CA, and to nobody else.
#[test]
fn etcd_is_known_by_its_certificate_and_the_server_by_its_own() {
    let dir = tempfile::tempdir().unwrap();
    make_certificates(dir.path());
    let path = |name: &str| dir.path().join(name);
    let text = |name: &str| path(name).display().to_string();
    let more = ["--client-cert-auth", "--trusted-ca-file", &text("ca"), "--cert-file", &text("etcd")];
    let more: Vec<String> =
        more.into_iter().chain(["--key-file", &text("etcd.key")]).map(str::to_owned).collect();
    let test = "etcd_is_known_by_its_certificate_and_the_server_by_its_own";
    let Some(etcd) = EtcdProcess::start_with(test, &more) else { return };
    let location: Location = etcd.url().parse().unwrap();
    let grant = |tls: Option<TlsFiles>| {
        let etcd = Etcd::new(&Location { tls, ..location.clone() }).unwrap();
        etcd.clone().wait(async move { etcd.grant(Duration::from_secs(60)).await })
    };
    let client = Some((path("client"), path("client.key")));
    grant(Some(TlsFiles { ca: path("ca"), client: client.clone() })).unwrap();
    assert!(grant(None).is_err(), "without TLS");
    assert!(grant(Some(TlsFiles { ca: path("ca"), client: None })).is_err(), "without a certificate");
    assert!(grant(Some(TlsFiles { ca: path("other"), client })).is_err(), "an etcd of another CA");

    let missing = Location { tls: Some(TlsFiles { ca: path("none"), client: None }), ..location };
    let error = Etcd::new(&missing).err().unwrap().to_string();
    assert!(error.contains("cannot use TLS with etcd") && error.contains("/none"), "{error}");
}

fn make_certificates(dir: &Path) {
    let mut params = CertificateParams::new(vec![]).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    for name in ["other", "ca"] {
        let key = KeyPair::generate().unwrap();
        fs::write(dir.join(name), params.self_signed(&key).unwrap().pem()).unwrap();
        let issuer = Issuer::from_params(&params, &key);
        for leaf in ["etcd", "client"] {
            let mut params = CertificateParams::new(vec![]).unwrap();
            params.subject_alt_names = vec![SanType::IpAddress("::1".parse().unwrap())];
            let key = KeyPair::generate().unwrap();
            fs::write(dir.join(leaf), params.signed_by(&key, &issuer).unwrap().pem()).unwrap();
            fs::write(dir.join(format!("{leaf}.key")), key.serialize_pem()).unwrap();
        }
    }
}
