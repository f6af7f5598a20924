//! The services that every gRPC port of Perigee has beside its own: health and server reflection, the latter in both of
//! the versions that tools speak.

use tokio::sync::watch;
use tonic::service::RoutesBuilder;
use tonic_health::ServingStatus;
use tonic_health::server::HealthReporter;
use tonic_reflection::server::Builder;

use crate::FILE_DESCRIPTOR_SET;

/// The descriptors for reflection do not load.
#[derive(Debug, thiserror::Error)]
#[error("server reflection: {0}")]
pub struct ReflectionError(String);

/// Adds health and reflection; the returned reporter is to be given to [`report_health`].
///
/// # Errors
/// [`ReflectionError`], which would be a fault of the build.
pub fn add_services(routes: &mut RoutesBuilder) -> Result<HealthReporter, ReflectionError> {
    let files = || {
        Builder::configure()
            .register_encoded_file_descriptor_set(FILE_DESCRIPTOR_SET)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
    };
    let failed = |error: tonic_reflection::server::Error| ReflectionError(error.to_string());
    let (reporter, health) = tonic_health::server::health_reporter();
    routes.add_service(health);
    routes.add_service(files().build_v1().map_err(failed)?);
    routes.add_service(files().build_v1alpha().map_err(failed)?);
    Ok(reporter)
}

/// Reports health for the empty name and `services` by what a process is in, as long as that may change.
pub async fn report_health<T>(
    reporter: HealthReporter,
    services: &[&str],
    mut state: watch::Receiver<T>,
    serves: impl Fn(&T) -> bool,
) {
    loop {
        let is_serving = serves(&state.borrow_and_update());
        let status = if is_serving { ServingStatus::Serving } else { ServingStatus::NotServing };
        reporter.set_service_status("", status).await;
        for service in services {
            reporter.set_service_status(*service, status).await;
        }
        if state.changed().await.is_err() {
            return;
        }
    }
}
