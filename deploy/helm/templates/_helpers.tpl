{{- define "name" -}}
{{ .Release.Name | trunc 30 | trimSuffix "-" }}
{{- end }}

{{/* Labels that a release's objects have; the argument is (dict "root" $ "component" "composer"). */}}
{{- define "selector" -}}
app.kubernetes.io/name: philharmonics
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end }}

{{- define "labels" -}}
{{ include "selector" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version }}
{{- end }}

{{- define "image" -}}
{{ printf "%s/%s:%s" .root.Values.image.repository .name (.root.Values.image.tag | default .root.Chart.AppVersion) }}
{{- end }}

{{/* Of a pod: nobody special, with no say in the cluster. */}}
{{- define "pod" -}}
automountServiceAccountToken: false
enableServiceLinks: false
securityContext:
  runAsNonRoot: true
  runAsUser: 10001
  runAsGroup: 10001
  fsGroup: 10001
  fsGroupChangePolicy: OnRootMismatch
  seccompProfile: { type: RuntimeDefault }
{{- with .Values.image.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
{{- end }}
{{- end }}

{{- define "container" -}}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities: { drop: [ALL] }
{{- end }}

{{/* The argument is (dict "cpu" 2 "memory" "2Gi"). What is asked for is what may be used, so that
     a window takes equally long on every node; /tmp is on the node's disk. */}}
{{- define "resources" -}}
resources:
  requests: { cpu: {{ .cpu | quote }}, memory: {{ .memory }}, ephemeral-storage: 1Gi{{ with .gpu }}, {{ . }}{{ end }} }
  limits: { cpu: {{ .cpu | quote }}, memory: {{ .memory }}, ephemeral-storage: 8Gi{{ with .gpu }}, {{ . }}{{ end }} }
{{- end }}

{{- define "stopping" -}}
lifecycle:
  # Nobody sends anything new by then: the endpoints have been told.
  preStop:
    exec: { command: [python, -c, "import time; time.sleep(5)"] }
{{- end }}

{{- define "spread" -}}
topologySpreadConstraints:
  {{- range list "kubernetes.io/hostname" "topology.kubernetes.io/zone" }}
  - maxSkew: 1
    topologyKey: {{ . }}
    whenUnsatisfiable: ScheduleAnyway
    labelSelector:
      matchLabels: {{- include "selector" $ | nindent 8 }}
  {{- end }}
{{- end }}

{{/* --- scaling ------------------------------------------------------------------------------ */}}

{{/* Labels of this release's series. */}}
{{- define "matchers" -}}
{{ .Values.autoscaling.matchers | default (printf "namespace=%q,release=%q" .Release.Namespace .Release.Name) }}
{{- end }}

{{/* Up at once, down slowly: a start costs the models' loading. Without Prometheus, as it is. */}}
{{- define "scaling" -}}
pollingInterval: 15
advanced:
  horizontalPodAutoscalerConfig:
    behavior:
      scaleUp:
        stabilizationWindowSeconds: 0
        policies: [{ type: Percent, value: 100, periodSeconds: 30 }, { type: Pods, value: 2, periodSeconds: 30 }]
      scaleDown:
        stabilizationWindowSeconds: 300
        policies: [{ type: Percent, value: 25, periodSeconds: 60 }, { type: Pods, value: 1, periodSeconds: 60 }]
{{- end }}

{{/* --- models ------------------------------------------------------------------------------- */}}

{{- define "models.job" -}}
{{- include "pod" . }}
restartPolicy: OnFailure
containers:
  - name: models
    image: {{ include "image" (dict "root" . "name" "exporter") }}
    imagePullPolicy: {{ .Values.image.pullPolicy }}
    {{- include "container" . | nindent 4 }}
    {{- include "resources" (dict "cpu" 1 "memory" "2Gi") | nindent 4 }}
    env:
      - { name: PHILHARMONICS_HUB, value: {{ .Values.models.hub | quote }} }
      - { name: FOLDER, value: {{ include "models.folder" . | quote }} }
    volumeMounts:
      - { name: models, mountPath: /models }
      - { name: tmp, mountPath: /tmp }
      {{- if .Values.models.manifest }}
      - { name: manifest, mountPath: /app/models.toml, subPath: models.toml, readOnly: true }
      {{- end }}
volumes:
  {{- include "models.volumes" . | nindent 2 }}
  - { name: tmp, emptyDir: { sizeLimit: 8Gi } }
{{- end }}

{{/* The folder in the volume: other models and other images have another one, so that two versions
     do not disturb each other, and the way back is open. */}}
{{- define "models.folder" -}}
{{- if or .Values.models.folder (not .Values.models.fill) -}}
{{ .Values.models.folder }}
{{- else -}}
{{ list (include "image" (dict "root" . "name" "exporter")) .Values.models.manifest .Values.models.hub | toJson | sha256sum | trunc 12 }}
{{- end }}
{{- end }}

{{- define "models.volumes" -}}
- name: models
  {{- if .Values.models.volume }}
  {{- toYaml .Values.models.volume | nindent 2 }}
  {{- else }}
  persistentVolumeClaim: { claimName: {{ include "name" . }}-models }
  {{- end }}
{{- if .Values.models.manifest }}
- name: manifest
  configMap: { name: {{ include "name" . }}-manifest-{{ .Values.models.manifest | sha256sum | trunc 8 }} }
{{- end }}
{{- end }}

{{- define "models.mounts" -}}
- { name: models, mountPath: /models, readOnly: true{{ with include "models.folder" . }}, subPath: {{ . | quote }}{{ end }} }
{{- if .Values.models.manifest }}
- { name: manifest, mountPath: /app/models.toml, subPath: models.toml, readOnly: true }
{{- end }}
{{- end }}

{{/* Whoever reads models waits until the Job has put the folder there, whole. */}}
{{- define "models.wait" -}}
{{- if .root.Values.models.fill }}
initContainers:
  - name: models
    image: {{ include "image" . }}
    imagePullPolicy: {{ .root.Values.image.pullPolicy }}
    {{- include "container" .root | nindent 4 }}
    {{- include "resources" (dict "cpu" 1 "memory" "128Mi") | nindent 4 }}
    command:
      - python
      - -c
      - |
        import pathlib, sys, time
        while not pathlib.Path(sys.argv[1]).is_dir():
            time.sleep(1)
      - /models/{{ include "models.folder" .root }}
    volumeMounts:
      - { name: models, mountPath: /models, readOnly: true }
{{- end }}
{{- end }}
