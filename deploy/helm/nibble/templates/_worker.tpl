{{/*
The pod of a group, or one pod of a group over several machines; without the leader (leads: false)
only the supervisor answers. (dict "root" $ "model" $m "name" "..." "of" (dict ...) "leads" true)
*/}}
{{- define "nibble.workerpod" -}}
{{- $root := .root -}}
{{- $m := .model -}}
{{- $name := .name -}}
{{- $of := .of -}}
{{- $cuda := eq $m.device "cuda" -}}
{{- $image := hasPrefix "oci://" $m.source -}}
{{- $fetches := and $m.source (not $image) -}}
metadata:
  labels:
    {{- include "nibble.labels" $root | nindent 4 }}
    app.kubernetes.io/component: worker
    nibble/model: {{ $name }}
    {{- if $fetches }}
    nibble/fetches: "true"
    {{- end }}
  {{- with $m.podAnnotations }}
  annotations: {{- toYaml . | nindent 4 }}
  {{- end }}
spec:
  serviceAccountName: {{ include "nibble.fullname" $root }}
  automountServiceAccountToken: false
  # Kubernetes would put NIBBLE_... variables of services into the pod, which are options.
  enableServiceLinks: false
  securityContext: {{- include "nibble.podsecurity" $root | nindent 4 }}
  terminationGracePeriodSeconds: {{ add $m.drainTimeoutSeconds 15 }}
  {{- with $root.Values.image.pullSecrets }}
  imagePullSecrets: {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with $m.priorityClassName }}
  priorityClassName: {{ . }}
  {{- end }}
  {{- with $m.runtimeClassName }}
  runtimeClassName: {{ . }}
  {{- end }}
  topologySpreadConstraints:
    {{- include "nibble.spread" (dict "labels" (include "nibble.modellabels" $of)) | nindent 4 }}
  {{- with $m.nodeSelector }}
  nodeSelector: {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with $m.tolerations }}
  tolerations: {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with $m.affinity }}
  affinity: {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- if $fetches }}
  initContainers:
    {{- include "nibble.fetch" (dict "root" $root "model" $m) | nindent 4 }}
  {{- end }}
  containers:
    - name: worker
      image: {{ include "nibble.image" (dict "root" $root "image" (ternary $root.Values.worker.cudaImage $root.Values.worker.image $cuda)) }}
      imagePullPolicy: {{ $root.Values.image.pullPolicy }}
      args:
        - --model=/models/{{ $m.path }}
        - --model-name={{ $m.name }}
        - --tp={{ int $m.tp }}
        - --device={{ $m.device }}
        {{- if $cuda }}
        - --memory-fraction={{ $m.memoryFraction }}
        - --activations={{ $m.activations }}
        {{- else }}
        - --threads={{ include "nibble.threads" $m }}
        - --numerics={{ $m.numerics }}
        - --head={{ $m.head }}
        {{- end }}
        {{- with $m.memoryPerRank }}
        - --memory={{ . }}
        {{- end }}
        - --max-sequences={{ int $m.maxSequences }}
        - --max-step-tokens={{ int $m.maxStepTokens }}
        - --context={{ int $m.context }}
        - --kv-blocks={{ int $m.kvBlocks }}
        - --queue-size={{ int $m.queueSize }}
        - --step-deadline={{ $m.stepDeadline }}
        - --drain-timeout={{ int $m.drainTimeoutSeconds }}s
        - --listen=0.0.0.0:{{ $root.Values.worker.port }}
        - --metrics-listen=0.0.0.0:{{ $root.Values.worker.metricsPort }}
        {{- if $root.Values.monitoring.vllmNames }}
        - --metrics-vllm-names
        {{- end }}
        {{- if $root.Values.tls.internal.enabled }}
        {{- include "nibble.porttls" (dict "folder" "internal-tls") | nindent 8 }}
        - --tls-client-ca=/etc/nibble/internal-tls/ca.crt
        {{- end }}
        - --log-level={{ $root.Values.log.level }}
        - --log-format={{ $root.Values.log.format }}
        {{- range $m.extraArgs }}
        - {{ . | quote }}
        {{- end }}
      {{- with $m.extraEnv }}
      env:
        {{- range $variable, $value := . }}
        - {name: {{ $variable }}, value: {{ $value | quote }}}
        {{- end }}
      {{- end }}
      ports:
        - {name: grpc, containerPort: {{ $root.Values.worker.port }}}
        {{- if gt (int $m.machines) 1 }}
        - {name: group, containerPort: 50053}
        {{- end }}
        - {name: metrics, containerPort: {{ $root.Values.worker.metricsPort }}}
      {{- if and .leads (not $root.Values.tls.internal.enabled) }}
      # The leader opens its port once the model is loaded and has run a step.
      startupProbe:
        grpc: {port: {{ $root.Values.worker.port }}}
        periodSeconds: 5
        failureThreshold: {{ div (add $m.startupSeconds 4) 5 }}
      {{- else }}
      startupProbe:
        httpGet: {path: /readyz, port: metrics}
        periodSeconds: 5
        failureThreshold: {{ div (add $m.startupSeconds 4) 5 }}
      {{- end }}
      # The supervisor answers, which sees every rank; a group that hangs ends itself with code 6.
      livenessProbe:
        httpGet: {path: /healthz, port: metrics}
        periodSeconds: 10
        failureThreshold: 3
      readinessProbe:
        {{- if and .leads (not $root.Values.tls.internal.enabled) }}
        grpc: {port: {{ $root.Values.worker.port }}, service: nibble.worker.v1.WorkerService}
        {{- else }}
        httpGet: {path: /readyz, port: metrics}
        {{- end }}
        periodSeconds: 2
        failureThreshold: 1
      resources: {{- include "nibble.podresources" $m | nindent 8 }}
      securityContext: {{- include "nibble.containersecurity" $root | nindent 8 }}
      terminationMessagePolicy: FallbackToLogsOnError
      volumeMounts:
        - {name: models, mountPath: /models, readOnly: true}
        {{- if $root.Values.tls.internal.enabled }}
        - {name: internal-tls, mountPath: /etc/nibble/internal-tls, readOnly: true}
        {{- end }}
        {{- if gt (int $m.tp) 1 }}
        - {name: shm, mountPath: /dev/shm}
        {{- end }}
  volumes:
    {{- if $root.Values.tls.internal.enabled }}
    {{- include "nibble.secretvolume" (dict "name" "internal-tls" "secret" (include "nibble.workertlssecret" $root)) | nindent 4 }}
    {{- end }}
    - name: models
      {{- if $image }}
      image: {reference: {{ trimPrefix "oci://" $m.source }}, pullPolicy: IfNotPresent}
      {{- else if $m.claim }}
      persistentVolumeClaim: {claimName: {{ $m.claim }}, readOnly: {{ not $fetches }}}
      {{- else }}
      emptyDir: {sizeLimit: {{ $m.sourceSize }}}
      {{- end }}
    {{- with $root.Values.fetch.caConfigMap }}
    {{- if $fetches }}
    - name: fetch-ca
      configMap: {name: {{ . }}, items: [{key: ca.crt, path: ca.crt}]}
    {{- end }}
    {{- end }}
    {{- if gt (int $m.tp) 1 }}
    - name: shm
      emptyDir: {medium: Memory, sizeLimit: {{ include "nibble.sharedmemory" $m }}}
    {{- end }}
{{- end -}}
