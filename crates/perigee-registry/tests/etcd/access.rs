//! An etcd that lets in only who shows a certificate and a password.

use etcd_client::{Certificate, Client, ConnectOptions, Identity as Shown, PermissionType, TlsOptions};
use perigee_registry::{EtcdConfig, EtcdOptions, Registry};
use perigee_testkit::certificates::Authority;

use crate::seen::Seen;
use crate::server::{Etcd, config};
use crate::{record, registry};

#[tokio::test]
async fn certificates_and_a_password_open_etcd_and_nothing_less_does() {
    let folder = tempfile::tempdir().expect("a folder");
    let authority = Authority::new(folder.path(), "authority").expect("made");
    let server = authority.issue("etcd", &["127.0.0.1"]).expect("made");
    let Some(etcd) = Etcd::start_with_tls(&authority, &server) else { return };
    // etcd takes a certificate's common name for a user's, where there is such a user.
    let identity = authority.issue("client", &["client"]).expect("made");
    let read = |path: &std::path::Path| std::fs::read(path).expect("it is there");
    let tls = TlsOptions::new()
        .ca_certificate(Certificate::from_pem(read(&authority.certificate)))
        .identity(Shown::from_pem(read(&identity.certificate), read(&identity.key)));
    let mut operator =
        Client::connect([etcd.endpoint()], Some(ConnectOptions::new().with_tls(tls))).await.expect("a client");
    operator.user_add("root", "root", None).await.expect("added");
    operator.user_grant_role("root", "root").await.expect("granted");
    operator.user_add("perigee", "secret", None).await.expect("added");
    operator.role_add("perigee").await.expect("added");
    let keys = etcd_client::Permission::new(PermissionType::Readwrite, "/perigee/").with_prefix();
    operator.role_grant_permission("perigee", keys).await.expect("granted");
    operator.user_grant_role("perigee", "perigee").await.expect("granted");
    operator.auth_enable().await.expect("enabled");

    let password = folder.path().join("password");
    std::fs::write(&password, "secret\n").expect("written");
    let all = EtcdOptions {
        etcd_ca: Some(authority.certificate.clone()),
        etcd_cert: Some(identity.certificate.clone()),
        etcd_key: Some(identity.key.clone()),
        etcd_user: Some("perigee".to_owned()),
        etcd_password_file: Some(password.clone()),
    };
    let with = |access: EtcdOptions| registry(EtcdConfig { access, ..config(&etcd) });
    let good = with(all.clone());
    let mut seen = Seen::new(good.watch());
    let _publication = good.publish(record("good", "1")).await.expect("published");
    seen.until_names(&["good"]).await;

    // These wait for an etcd that lets them in. One of them comes in once its password is right: files are read anew.
    let late = folder.path().join("late");
    std::fs::write(&late, "wrong").expect("written");
    let shut_out = [
        with(EtcdOptions { etcd_user: None, etcd_password_file: None, ..all.clone() }),
        with(EtcdOptions { etcd_cert: None, etcd_key: None, ..all.clone() }),
        with(EtcdOptions::default()),
        with(EtcdOptions { etcd_password_file: Some(late.clone()), ..all }),
    ];
    let waiting: Vec<_> = shut_out
        .into_iter()
        .enumerate()
        .map(|(index, registry)| {
            tokio::spawn(async move { registry.publish(record(&format!("late-{index}"), "1")).await })
        })
        .collect();
    let _another = good.publish(record("another", "1")).await.expect("published");
    seen.until_names(&["another", "good"]).await;
    std::fs::write(&late, "secret").expect("written");
    seen.until_names(&["another", "good", "late-3"]).await;
    for attempt in &waiting[..3] {
        assert!(!attempt.is_finished(), "it was let in");
        attempt.abort();
    }
}
